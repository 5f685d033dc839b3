"""Table: what a set of runs says, one row a candidate, one column a held-out domain."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

from dgavg.benchmark.files import differences
from dgavg.benchmark.labels import labels
from dgavg.benchmark.results import (
    SELECTED,
    Cell,
    Runs,
    domains_of,
    grouped,
    protocol_of,
    results,
    score_of,
    searched,
    title_of,
)
from dgavg.benchmark.statistics import mean_and_error, paired_interval, rank_correlation
from dgavg.benchmark.text import aligned, cell, difference, interval
from dgavg.errors import require, unknown
from dgavg.evaluation.selection import RULES

if TYPE_CHECKING:
    import pandas as pd

AGAINST = "against its runs"
POOLED = -1  # the seed of a record that is of the runs of all seeds
Rows = dict[tuple[str, str], dict[Cell, float]]


class Table:
    """Results of runs that share a data set and a protocol.

    `runs` maps a run's name to the records of each of its (fold, seed) runs. `rule` selects the
    checkpoint of each candidate on its own; by default the protocol's. `print(table)` shows it,
    `to_frame()` has every number; `differences()` and `correlations()` are more text.

    A row is a candidate of a run: runs in the order given, candidates in the order of the chain,
    then `selected`, which is what the rule picks over all candidates and checkpoints. Runs that
    differ in nothing but hyper-parameters drawn by a search are one: in each cell the rule picks
    the draw. Runs that differ in anything else are told apart by the settings they differ in.

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
        self.protocol, self.data, self.searched = first["protocol"], first["data"], searched(first)
        self.rule = rule or self.protocol["selection"]
        if self.rule not in RULES:
            raise unknown("selection rule", self.rule, RULES)
        self.groups = grouped(runs)
        require(
            self.rule != "loo" or any(cells.pairs for cells in self.groups.values()),
            "the rule loo reads runs that left two domains out: train with holdout=pairs",
        )
        self.labels = labels({name: cells.head for name, cells in self.groups.items()})
        self.changed = _changed([cells.head for cells in self.groups.values()])
        self.results = [
            result
            for name, cells in self.groups.items()
            for result in results(name, cells, self.rule)
        ]
        draws = [len(by) for cells in self.groups.values() for by in cells.runs.values()]
        self.draws = max(draws, default=0)  # of the cell that has most
        held_out = {domain for cells in self.groups.values() for domain, _ in cells.runs}
        # some records have the held-out domain alone: the longest say the order of all
        every = sorted((domains_of(record) for _, record in heads), key=len, reverse=True)
        self.held_out = [d for d in dict.fromkeys(chain(*every)) if d in held_out]
        self.seeds = sorted({s for c in self.groups.values() for _, s in c.runs} - {POOLED})
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
        last = {key: cells for key, cells in rows.items() if key[1] == SELECTED}
        ordered: Rows = {}
        for run in dict.fromkeys(run for run, _ in rows):
            ordered |= {k: v for k, v in rows.items() if k[0] == run and k not in last}
            ordered |= {k: v for k, v in last.items() if k[0] == run}
        return ordered

    def __str__(self) -> str:
        lines = self.lines()
        notes = "".join(f"\n\n{note}" for note in self.footnotes(lines))
        return "\n".join([*self.title(), "", *aligned(lines)]) + notes

    def lines(self) -> list[list[str]]:
        """The table as text: its head, then its rows; a chain's name stands in its first alone."""
        rows, previous = self.rows(), ""
        lines = [["chain", "candidate", *self.held_out, "mean", "against live"]]
        for (run, candidate), cells in rows.items():
            seeds = [POOLED] if any(s == POOLED for _, s in cells) else self.seeds
            by_domain = [[cells[d, s] for s in seeds if (d, s) in cells] for d in self.held_out]
            whole = len(cells) == len(self.held_out) * len(seeds)
            means = [sum(v) / len(v) for v in zip(*by_domain, strict=True)] if whole else []
            shown = [cell(v, len(seeds)) for v in by_domain]
            shown = [
                text + "°" * (text != "X" and self._lacks_draws(run, d))
                for d, text in zip(self.held_out, shown, strict=True)
            ]
            name = "" if run == previous else self.labels[run]
            gain = self._gain(rows, run, candidate) if whole else ""
            lines.append([name, candidate, *shown, cell(means, len(seeds)), gain])
            previous = run
        return lines

    def differences(self) -> str:
        """Each chain against the first, paired by held-out domain and seed, with an interval.

        Empty for one chain, and for one seed.
        """
        title, lines = self.difference_lines()
        return "\n".join([title, "", *aligned(lines, names=1, last=False)]) if lines else ""

    def difference_lines(self) -> tuple[str, list[list[str]]]:
        """What `differences` says: its title, and its head and rows, none where it is empty."""
        rows = self.rows()
        ends = {run: cells for (run, _), cells in rows.items()}  # selected comes last
        if not ends:
            return "", []
        first, *others = ends
        lines = [["chain", "live", SELECTED]]
        for run in others:
            pairs = [(rows.get((r, "live"), {}) for r in (run, first)), (ends[run], ends[first])]
            shown = [interval(paired_interval(_paired(*pair))) for pair in pairs]
            if any(shown):
                lines.append([self.labels[run], *shown])
        title = (
            f"difference to {self.labels[first]}, paired by held-out domain and seed "
            "(95 % interval over seeds)"
        )
        return title, lines if len(lines) > 1 else []

    def correlations(self) -> str:
        """How well validation accuracy ranks the checkpoints of a run by test accuracy."""
        title, lines = self.correlation_lines()
        return "\n".join([title, "", *aligned(lines, last=False)]) if lines else ""

    def correlation_lines(self) -> tuple[str, list[list[str]]]:
        """What `correlations` says: its title, and its head and rows, none where it is empty."""
        lines = [["chain", "candidate", "rank correlation", "runs"]]
        for name, cells in self.groups.items():
            every = [records for draws in cells.runs.values() for records in draws.values()]
            label = self.labels[name]
            for candidate in dict.fromkeys(c for r in every for c in r[-1]["candidates"]):
                each = [rank_correlation(records, candidate) for records in every]
                found = [value for value in each if value is not None]
                if found:
                    mean, error = mean_and_error(found)
                    text = f"{mean:.2f}" + (f" ± {error:.2f}" if len(found) > 1 else "")
                    lines.append([label, candidate, text, str(len(found))])
                    label = ""
        title = (
            "Spearman's correlation of validation and test accuracy over the checkpoints of a run, "
            "mean ± standard error over runs"
        )
        return title, lines if len(lines) > 1 else []

    def _lacks_draws(self, run: str, held_out: str) -> bool:
        """Whether a cell chose among fewer hyper-parameter draws than another one."""
        cells = self.groups[run]
        drawn = "search" in cells.head  # a soup of them chooses nothing
        here = [len(by_draw) for (domain, _), by_draw in cells.runs.items() if domain == held_out]
        return drawn and any(n < self.draws for n in here)

    def footnotes(self, lines: list[list[str]]) -> list[str]:
        """What the signs in `lines()` mean, a line each."""
        text = []
        if any(line[-1].endswith(AGAINST) for line in lines):
            text.append(f"{AGAINST}: the weights it is made of, each scored alone as it was")
        if any("X" in line[2:] for line in lines[1:]):
            each = f" for each of the seeds {', '.join(map(str, self.seeds))}" if self.seeds else ""
            text.append(f"X: not there{each}")
        if any(part.endswith("°") for line in lines for part in line):
            text.append("°: chosen among fewer draws of hyper-parameters than in another cell")
        return text

    def _gain(self, rows: Rows, run: str, candidate: str) -> str:
        """What a row has over the live weights of its run, or a soup over the mean of its runs."""
        cells = rows[run, candidate]
        if not any((run, *key) in self.combined for key in cells):
            return difference(cells, rows.get((run, "live"), {})) if candidate != "live" else ""
        means = {}
        for key in cells:
            record = self.combined[run, *key]
            own = [m["splits"] for m in record["members"] if "splits" in m]
            if len(own) == len(record["members"]):
                means[key] = sum(score_of(record, splits)[0] for splits in own) / len(own)
        text = difference(cells, means)
        return f"{text} {AGAINST}" if text else ""

    def title(self) -> list[str]:
        """What the table shows, of which runs, and by which rule; a line each."""
        n = len(self.seeds)
        seeds = f"{n} seed" + "s" * (n > 1) if n else "the runs of all seeds together"
        if not self.held_out:
            seeds = "no run that left out one domain alone"
        error = ", mean ± standard error over the seeds" if len(self.seeds) > 1 else ""
        name = title_of(self.data)
        size = "searched" if "protocol.batch_size" in self.searched else self.protocol["batch_size"]
        lines = [
            f"{name}: accuracy (%) on the domain held out{error}",
            f"protocol {self.protocol['name']}: {self.protocol['steps']} steps, "
            f"{size} images a domain, {seeds}"
            + f", the best of {self.draws} draws of hyper-parameters"
            * (self.draws > 1),
            f"checkpoint: {RULES[self.rule]}",
        ]
        if self.changed:
            lines.append(f"NOT as the protocol says: {', '.join(self.changed)}")
        return lines


def _paired(mine: Mapping[Cell, float], theirs: Mapping[Cell, float]) -> dict[str, list[float]]:
    """Differences by held-out domain, over the seeds that both have."""
    found: dict[str, list[float]] = {}
    for held_out, seed in mine:
        if (held_out, seed) in theirs:
            gain = mine[held_out, seed] - theirs[held_out, seed]
            found.setdefault(held_out, []).append(gain)
    return found


def _changed(heads: list[Mapping[str, Any]]) -> list[str]:
    """The settings in which runs depart from their protocol, each once."""
    return list(dict.fromkeys(text for head in heads for text in head.get("changed", ())))


def tables(runs: Runs, rule: str | None = None) -> list[Table]:
    """A table for each data set and protocol among the runs."""
    return [Table(group, rule) for group in separated(runs)]


def separated(runs: Runs) -> list[Runs]:
    """The runs of each data set and protocol, which one table can hold."""
    groups: dict[str, Runs] = {}
    for name, group in runs.items():
        for records in group:
            key = json.dumps(_identity(records[0]), sort_keys=True)
            groups.setdefault(key, {}).setdefault(name, []).append(records)
    return list(groups.values())


def _identity(record: Mapping[str, Any]) -> dict[str, Any]:
    """What all runs of a table share: the data by what is in them, wherever they came from."""
    data = {k: record["data"][k] for k in ("name", "content", "splits") if k in record["data"]}
    return {"data": data, "protocol": protocol_of(record)}
