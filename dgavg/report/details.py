"""Details: tables of batch-norm policies, cost, settings and environments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dgavg.benchmark.reading import key_of
from dgavg.benchmark.statistics import mean_and_error
from dgavg.benchmark.text import difference
from dgavg.report.section import Section

Lines = list[list[str]]  # the head, then rows; empty where there is nothing to say
UNKNOWN = "unknown"
SETTINGS = ("protocol", "data", "model", "optimizer", "stopping", "precision", "device",
            "init_seed", "also_batchnorm", "search", "changed")  # fmt: skip


def batchnorm_lines(section: Section) -> Lines:
    """The policy of each candidate, and what others give where they were scored."""
    rows, lines, previous = section.rows, [], ""
    policies = {(r.run, r.candidate): r.batchnorm for r in section.table.results}
    others = list(dict.fromkeys(c.partition("@")[2] for _, c in rows if "@" in c))
    for run, candidate in rows:
        if candidate not in section.candidates:
            continue
        mine = rows[run, candidate]
        changes = [difference(rows.get((run, f"{candidate}@{p}"), {}), mine) for p in others]
        mean = _mean(section, run, candidate)
        label = section.table.labels[run] if run != previous else ""
        line = [label, candidate, policies[run, candidate], mean]
        lines.append([*line, *(change or "–" for change in changes)])
        previous = run
    head = ["chain", "candidate", "policy", "mean accuracy", *(f"with {p} instead" for p in others)]
    return [head, *lines]


def _mean(section: Section, run: str, candidate: str) -> str:
    """The mean column of the table."""
    lines, label = section.table.lines(), ""
    for line in lines[1:]:
        label = line[0] or label
        if (label, line[1]) == (section.table.labels[run], candidate):
            return line[-2]
    return "X"


def cost_lines(section: Section) -> Lines:
    """Seconds of training and evaluation, as the runs' own clocks have them."""
    lines = [["chain", "runs", "seconds a run", "seconds in all", "evaluations a run"]]
    for run in section.trained():
        by_draw = section.table.groups[run].runs.values()
        every = [records for each in by_draw for records in each.values()]
        seconds = [r[-1]["timing"]["seconds"] for r in every if "timing" in r[-1]]
        if seconds:
            mean, error = mean_and_error(seconds)
            each = f"{mean:.1f}" + (f" ± {error:.1f}" if len(seconds) > 1 else "")
            counts = sorted({len(r) for r in every})
            count = f"{counts[0]}" + (f" to {counts[-1]}" if len(counts) > 1 else "")
            label = section.table.labels[run]
            lines.append([label, str(len(seconds)), each, f"{sum(seconds):.1f}", count])
    return lines if len(lines) > 1 else []


def setting_lines(section: Section) -> Lines:
    """All that the records say of how runs were made, but the chains' own settings."""
    heads = [cells.head for cells in section.table.groups.values()]
    found: dict[str, list[str]] = {}
    for head in heads:
        for key, value in _leaves({k: head[k] for k in SETTINGS if k in head}):
            values = found.setdefault(key, [])
            values += [value] if value not in values else []
    return [["setting", "value"], *([key, "; ".join(v)] for key, v in found.items())]


def chain_lines(section: Section) -> Lines:
    """The settings of the links of each chain."""
    lines = [["chain", "setting", "value"]]
    for run, cells in section.table.groups.items():
        leaves = list(_leaves(cells.head["trainer"]))
        labels = [section.table.labels[run], *[""] * len(leaves)]
        lines += [[label, *leaf] for label, leaf in zip(labels, leaves, strict=False)]
    return lines if len(lines) > 1 else []


def environment_lines(section: Section) -> Lines:
    """What runs were trained on, with how many runs where they were several."""
    each = [
        section.environments.get((name, key_of(records[0])), ())
        for name, group in section.runs.items()
        for records in group
    ]
    names = list(dict.fromkeys(key for found in each for one in found for key in one))
    lines = [["", "value"]]
    for name in names or ["environment"]:
        counts: dict[str, int] = {}
        for found in each:
            for value in dict.fromkeys(_said(one.get(name)) for one in found) or [UNKNOWN]:
                counts[value] = counts.get(value, 0) + 1
        several = len(counts) > 1
        texts = [f"{v} ({n} runs)" if several else v for v, n in counts.items()]
        lines.append([name, "; ".join(texts)])
    return lines


def _said(value: Any) -> str:
    return "none" if value is None else str(value)


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Settings by dotted name."""
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _leaves(inner, f"{prefix}{key}.")
        elif inner is None:
            yield f"{prefix}{key}", "none"
        elif isinstance(inner, list):
            yield f"{prefix}{key}", ", ".join(map(str, inner)) or "none"
        else:
            yield f"{prefix}{key}", f"{inner:g}" if isinstance(inner, float) else str(inner)
