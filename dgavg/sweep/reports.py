"""Reports: what a job tells the process that started it, through a file on the disk they share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dgavg.benchmark.reading import named, records_of
from dgavg.benchmark.results import Runs
from dgavg.disk import write_text
from dgavg.sweep.words import command


@dataclass
class Failed:
    """What could not be done: the overrides that do it again, and why in one line.

    `busy` is the folder of a run that another process was training.
    """

    overrides: list[str]
    message: str
    busy: str | None = None


@dataclass
class Report:
    """One job: its overrides, the folders of its finished runs, what failed, and lines to show.

    `value` is what a sweeper maximizes. A job that was killed has not `ended`.
    """

    overrides: list[str]
    runs: list[str] = field(default_factory=list)
    failed: list[Failed] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    value: float | None = None
    ended: bool = False

    @property
    def busy(self) -> list[Path]:
        """The folders of its runs that another process was training."""
        return [Path(one.busy) for one in self.failed if one.busy is not None]

    def write(self, folder: Path, number: int) -> None:
        """Write the report of job `number`."""
        write_text(folder / f"{number}.json", json.dumps(asdict(self)))


def read_report(folder: Path, number: int) -> Report | None:
    """The report of job `number`; none where it has not begun."""
    try:
        found = json.loads((folder / f"{number}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return Report(**{**found, "failed": [Failed(**one) for one in found["failed"]]})


def read_reports(folder: Path) -> list[Report]:
    """The reports of all jobs that have begun, in their order."""
    numbers = sorted(int(path.stem) for path in folder.glob("*.json"))
    return [report for n in numbers if (report := read_report(folder, n)) is not None]


def finished(reports: Iterable[Report]) -> Runs:
    """The records of all finished runs, as tables take them."""
    return records_of(named(Path(run) for report in reports for run in report.runs))


def failures(reports: Sequence[Report], flags: Sequence[str]) -> Iterator[str]:
    """What failed, each reason once, followed by the commands that repeat what it stopped."""
    every = [one for report in reports for one in report.failed]
    for message in dict.fromkeys(one.message for one in every):
        yield f"dgavg: {message}"
        yield from (
            f"  again: {command(one.overrides, flags)}" for one in every if one.message == message
        )
