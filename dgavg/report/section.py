"""Section: all that the page says of the runs of one data set and protocol."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from dgavg.benchmark.reading import Environments
from dgavg.benchmark.results import SELECTED, Result, Runs, title_of
from dgavg.benchmark.statistics import Point, curve
from dgavg.benchmark.table import POOLED, Table
from dgavg.errors import UserError
from dgavg.evaluation import RULES, selected_step
from dgavg.report.windows import Window, window


@dataclass(frozen=True)
class Trace:
    """One candidate of one run: its curve, where the rule selects it, and its window there."""

    seed: int
    points: list[Point]
    selected: Point
    window: Window | None


class Section:
    """The tables of `runs` by selection rule, that of `rule` first, which the figures go by.

    `rule` is the protocol's by default. `environments`: where each run was trained.

    Raises `UserError` as `Table` does.
    """

    def __init__(
        self,
        runs: Runs,
        rule: str | None = None,
        environments: Environments | None = None,
    ) -> None:
        self.runs, self.environments = runs, environments or {}
        self.table = Table(runs, rule)
        self.tables = {self.table.rule: self.table}
        for other in RULES:
            try:
                found = Table(runs, other)
            except UserError:  # these records can't tell
                continue
            if found.results:
                self.tables.setdefault(other, found)

    @property
    def name(self) -> str:
        """The data set as a title says it."""
        return title_of(self.table.data)

    @property
    def protocol(self) -> str:
        """Its name."""
        return str(self.table.protocol["name"])

    @cached_property
    def rows(self) -> dict[tuple[str, str], dict[tuple[str, int], float]]:
        """Accuracy by (run, candidate), then by (held-out domain, seed)."""
        return self.table.rows()

    @cached_property
    def candidates(self) -> list[str]:
        """Names of the candidates of all chains, but those under another batch-norm policy."""
        every = [c for _, c in self.rows if "@" not in c and c != SELECTED]
        return list(dict.fromkeys(every))

    def own(self, run: str) -> list[str]:
        """The candidates of one chain, but those under another batch-norm policy."""
        return [c for r, c in self.rows if r == run and c in self.candidates]

    def pooled(self, run: str) -> bool:
        """Whether a row is of the runs of all seeds together."""
        return any(seed == POOLED for _, seed in self.table.groups[run].runs)

    def trained(self) -> list[str]:
        """The chains that have curves: all but soups and ensembles, which have one evaluation."""
        return [
            name
            for name, cells in self.table.groups.items()
            if any(len(r) > 1 for by_draw in cells.runs.values() for r in by_draw.values())
        ]

    def traces(self, run: str, candidate: str, held_out: str | None = None) -> list[Trace]:
        """A candidate of a chain in all runs, or in those that held out one domain."""
        places = self.table.held_out if held_out is None else [held_out]
        return [t for place in places for t in self._traces.get((run, candidate, place), ())]

    @cached_property
    def _traces(self) -> dict[tuple[str, str, str], list[Trace]]:
        found: dict[tuple[str, str, str], list[Trace]] = {}
        for r in self.table.results:
            if r.candidate in self.candidates:
                key = r.run, r.candidate, r.held_out
                found.setdefault(key, []).append(self._trace(r))
        return found

    def _trace(self, result: Result) -> Trace:
        cells, cell = self.table.groups[result.run], (result.held_out, result.seed)
        records = cells.runs[cell][result.hparams_seed]  # of several draws the one picked
        rule = self.table.rule if len(records) > 1 else "last"
        pairs = cells.pairs_of(cell, result.hparams_seed)
        index = selected_step(records, result.candidate, rule, pairs) or 0
        points = curve(records, result.candidate)
        (selected,) = curve([records[index]], result.candidate)
        latest = {point.step: point for point in points}  # there may be two at the end
        found = window(result.candidate, records, index)
        return Trace(result.seed, list(latest.values()), selected, found)
