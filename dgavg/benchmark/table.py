"""Table: what a set of runs says, one row a candidate, one column a held-out domain."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgavg.benchmark.files import differences, read_records
from dgavg.benchmark.labels import labels
from dgavg.errors import require, unknown
from dgavg.evaluation.selection import RULES, selected_step, validation_score

if TYPE_CHECKING:
    import pandas as pd

AGAINST = "against its runs"
POOLED = -1  # the seed of a record that is of the runs of all seeds
Runs = dict[str, list[list[dict[str, Any]]]]  # by name: the records of each fold and seed
Rows = dict[tuple[str, str], dict[tuple[str, int], float]]


@dataclass(frozen=True)
class Result:
    """What one candidate of one run reached at its selected step; accuracies in [0, 1]."""

    run: str
    chain: str
    candidate: str
    held_out: str
    seed: int
    step: int
    accuracy: float
    loss: float
    validation: float
    batchnorm: str


def test_score(record: Mapping[str, Any], candidate: str) -> tuple[float, float]:
    """Accuracy and loss on the held-out domain: its `in` part, or both where the protocol says."""
    return _test_score(record, record["candidates"][candidate]["splits"])


def _test_score(record: Mapping[str, Any], splits: Mapping[str, Any]) -> tuple[float, float]:
    parts = ("in", "out") if record["protocol"]["test_split"] == "all" else ("in",)
    names = [f"{record['held_out']}/{part}" for part in parts]
    scores = [splits[name] for name in names if name in splits]
    n = sum(s["n"] for s in scores)
    losses = [s["loss"] if s["loss"] is not None else math.inf for s in scores]
    accuracy = sum(s["accuracy"] * s["n"] for s in scores) / n
    return accuracy, sum(x * s["n"] for x, s in zip(losses, scores, strict=True)) / n


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error as DomainBed prints it, the population deviation over √n.

    >>> [round(v, 4) for v in mean_and_error([0.1, 0.2, 0.3])]
    [0.2, 0.0471]
    """
    n = len(values)
    mean = sum(values) / n
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / n) / math.sqrt(n)


class Table:
    """Results of runs that share a data set and a protocol.

    `runs` maps a run's name to the records of each of its (fold, seed) runs. `rule` selects the
    checkpoint of each candidate on its own; by default the protocol's. `print(table)` shows it,
    `to_frame()` has every number.

    A row is a candidate of a run: runs in the order given, candidates in the order of the chain.
    Runs that differ in anything beside their chain are told apart by the settings they differ in.

    Raises `UserError` for no runs, for runs of different protocols or data, and an unknown rule.
    """

    def __init__(self, runs: Runs, rule: str | None = None) -> None:
        heads = [(name, records[0]) for name, group in runs.items() for records in group if records]
        require(bool(heads), "no finished run to make a table of")
        origin, first = heads[0]
        for name, record in heads:
            for part in ("protocol", "data"):
                found = list(differences(_identity(record)[part], _identity(first)[part], part))
                require(
                    not found,
                    f"{name} and {origin} differ in {part} ({'; '.join(found)}): a table never "
                    "mixes two of them; print one table for each",
                )
        self.protocol, self.data = first["protocol"], first["data"]
        self.labels = labels(dict(heads))
        self.rule = rule or self.protocol["selection"]
        if self.rule not in RULES:
            raise unknown("selection rule", self.rule, RULES)
        self.results = [
            result
            for name, group in runs.items()
            for records in group
            for result in _results(name, records, self.rule)
        ]
        held_out = {r.held_out for r in self.results}
        self.held_out = [d for d in _domains(record for _, record in heads) if d in held_out]
        self.seeds = sorted({r.seed for r in self.results} - {POOLED})
        self.combined = {
            (name, record["held_out"], record["seed"]): record
            for name, record in heads
            if "members" in record
        }

    def to_frame(self) -> pd.DataFrame:
        """One row for every candidate of every run: its selected step and what it reached there."""
        import pandas as pd

        return pd.DataFrame([vars(r) for r in self.results])

    def rows(self) -> Rows:
        """Accuracy by (run, candidate), then by (held-out domain, seed)."""
        rows: Rows = {}
        for r in self.results:
            rows.setdefault((r.run, r.candidate), {})[r.held_out, r.seed] = r.accuracy
        return rows

    def __str__(self) -> str:
        rows, previous = self.rows(), ""
        lines = [["chain", "candidate", *self.held_out, "mean", "against live"]]
        for (run, candidate), cells in rows.items():
            label = self.labels[run]
            seeds = [POOLED] if any(s == POOLED for _, s in cells) else self.seeds
            by_domain = [[cells[d, s] for s in seeds if (d, s) in cells] for d in self.held_out]
            shown = [_cell(values, len(seeds)) for values in by_domain]
            whole = len(cells) == len(self.held_out) * len(seeds)
            means = [sum(v) / len(v) for v in zip(*by_domain, strict=True)] if whole else []
            gain = self._gain(rows, run, candidate) if whole else ""
            lines.append(
                [
                    "" if run == previous else label,
                    candidate,
                    *shown,
                    _cell(means, len(seeds)),
                    gain,
                ]
            )
            previous = run
        text = [self._title(), "", *_aligned(lines)]
        if any(line[-1].endswith(AGAINST) for line in lines):
            text += ["", f"{AGAINST}: the weights it is made of, each scored alone as it was"]
        if any("X" in line[2:] for line in lines[1:]):
            each = f" for each of the seeds {', '.join(map(str, self.seeds))}" if self.seeds else ""
            text += ["", f"X: not there{each}"]
        return "\n".join(text)

    def _gain(self, rows: Rows, run: str, candidate: str) -> str:
        """What a row has over the live weights of its run, or a soup over the mean of its runs."""
        cells = rows[run, candidate]
        if not any((run, *key) in self.combined for key in cells):
            return _difference(cells, rows.get((run, "live"), {})) if candidate != "live" else ""
        means = {}
        for key in cells:
            record = self.combined[run, *key]
            own = [m["splits"] for m in record["members"] if "splits" in m]
            if len(own) == len(record["members"]):
                means[key] = sum(_test_score(record, splits)[0] for splits in own) / len(own)
        difference = _difference(cells, means)
        return f"{difference} {AGAINST}" if difference else ""

    def _title(self) -> str:
        n = len(self.seeds)
        seeds = f"{n} seed" + "s" * (n > 1) if n else "the runs of all seeds together"
        error = ", mean ± standard error over the seeds" if len(self.seeds) > 1 else ""
        name = self.data.get("title", self.data["name"])
        return (
            f"{name}: accuracy (%) on the domain held out{error}\n"
            f"protocol {self.protocol['name']}: {self.protocol['steps']} steps, "
            f"{self.protocol['batch_size']} images a domain, {seeds}\n"
            f"checkpoint: {RULES[self.rule]}"
        )


def _cell(values: Sequence[float], seeds: int) -> str:
    """One cell; X where a seed is missing, since a mean over the others would mislead."""
    if not values or len(values) != seeds:
        return "X"
    mean, error = mean_and_error(values)
    return f"{100 * mean:.1f}" + (f" ± {100 * error:.1f}" if len(values) > 1 else "")


def _difference(cells: Mapping[Any, float], others: Mapping[Any, float]) -> str:
    """The mean difference over pairs of runs, and how many of them gained."""
    pairs = [cells[key] - others[key] for key in cells if key in others]
    if not pairs:
        return ""
    mean, error = mean_and_error(pairs)
    if len(pairs) == 1:
        return f"{100 * mean:+.1f}"
    better = sum(p > 0 for p in pairs)
    return f"{100 * mean:+.1f} ± {100 * error:.1f} ({better} of {len(pairs)} better)"


def _results(run: str, records: Sequence[Mapping[str, Any]], rule: str) -> Iterable[Result]:
    for candidate in records[-1]["candidates"]:  # the last has them all, in the chain's order
        # of one record, as a soup has, there is nothing to select
        index = selected_step(records, candidate, rule if len(records) > 1 else "last")
        if index is None:
            continue
        record = records[index]
        found = record["candidates"][candidate]
        accuracy, loss = test_score(record, candidate)
        yield Result(
            run=run,
            chain=record["chain"],
            candidate=candidate,
            held_out=record["held_out"],
            seed=record["seed"],
            step=record["step"],
            accuracy=accuracy,
            loss=loss,
            validation=validation_score(found["splits"], record["held_out"]),
            batchnorm=found["batchnorm"],
        )


def _domains(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """The domains in the order of the data set; some records have the held-out one alone."""
    candidates = (next(iter(record["candidates"].values())) for record in records)
    each = [[split.rpartition("/")[0] for split in c["splits"]] for c in candidates]
    return list(dict.fromkeys(chain(*sorted(each, key=len, reverse=True))))


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width: names and the last one to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [
        "  ".join(
            cell.rjust(w) if 2 <= i < len(line) - 1 else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return [rows[0], "─" * (sum(widths) + 2 * (len(widths) - 1)), *rows[1:]]


def tables(runs: Runs, rule: str | None = None) -> list[Table]:
    """A table for each data set and protocol among the runs."""
    groups: dict[str, Runs] = {}
    for name, group in runs.items():
        for records in group:
            key = json.dumps(_identity(records[0]), sort_keys=True)
            groups.setdefault(key, {}).setdefault(name, []).append(records)
    return [Table(group, rule) for group in groups.values()]


def finished_runs(folders: Sequence[Path]) -> tuple[dict[Path, str], int]:
    """The folder of every finished run below `folders` with its name, and how many have not ended.

    Raises `UserError` for a folder that is missing or holds no finished run.
    """
    found: list[Path] = []
    seen: set[Path] = set()
    unfinished = 0
    for folder in folders:
        require(folder.is_dir(), f"no folder {folder}: give one of runs, such as runs/")
        each = {path.resolve().parent for path in folder.rglob("config.yaml")}
        ended = {run for run in each if (run / "done").exists()}
        require(bool(ended), f"no finished run in {folder}")
        unfinished += len(each - ended - seen)
        found += sorted(ended - seen)
        seen |= each
    names = [path.name for path in dict.fromkeys(run.parent.parent for run in found)]
    return {
        run: group.name if names.count(group.name) == 1 else str(group)
        for run in found
        for group in [run.parent.parent]
    }, unfinished


def read_runs(folders: Sequence[Path]) -> tuple[Runs, int]:
    """The records of every finished run below `folders`, and how many have not ended.

    Raises `UserError` as `finished_runs` does, and for damaged records.
    """
    found, unfinished = finished_runs(folders)
    runs: Runs = {}
    for folder, name in found.items():
        runs.setdefault(name, []).append(read_records(folder / "records.jsonl"))
    return runs, unfinished


def _identity(record: Mapping[str, Any]) -> dict[str, Any]:
    """What all runs of a table share: the data by what is in them, wherever they came from."""
    data = {k: record["data"][k] for k in ("name", "content")}
    return {"data": data, "protocol": record["protocol"]}
