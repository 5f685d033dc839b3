"""Rounds: jobs are launched until each has ended, whatever becomes of their processes."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from dgavg.benchmark.campaign import WAIT, left
from dgavg.benchmark.folder import is_free
from dgavg.errors import UserError
from dgavg.sweep.reports import Failed, Report, read_report

LOOK = 0.3  # seconds between two looks for jobs that have ended
Launch = Callable[..., Any]  # of a Hydra launcher: (job_overrides, initial_job_idx)


def rounds(
    launch: Launch, jobs: Sequence[Sequence[str]], folder: Path, launcher: str
) -> list[Report]:
    """Launch jobs of one run each; returns their reports, once nothing is left to do.

    A run that another process is training is left to it, and looked at again when that has ended.
    Where a launcher gives up because one of its processes died, the jobs that had begun are
    launched again one by one: so the one that kills its process stops no other.

    Raises `UserError` where the launcher can't launch anything.
    """
    show = _Show(len(jobs), folder)
    batches, number = [list(range(len(jobs)))] if jobs else [], 0
    done: dict[int, Report] = {}
    with show.watching():
        show.say(f"{len(jobs)} run{'s' * (len(jobs) != 1)} on {launcher}, each a job of its own")
        while batches:
            batch, first = batches.pop(0), number
            number += len(batch)
            crash = _launched(launch, [jobs[i] for i in batch], first)
            found = {i: read_report(folder, first + k) for k, i in enumerate(batch)}
            ended = {i: report for i, report in found.items() if report and report.ended}
            begun = [i for i in batch if found[i] and i not in ended]
            waiting = [i for i in batch if not found[i]]
            if crash is not None and first == 0 and not ended and not begun:
                raise UserError(f"hydra/launcher={launcher}: {_line(crash)}") from crash
            if crash is not None and len(batch) > 1 and (ended or begun):
                for i in begun:  # nobody will end these reports
                    (folder / f"{first + batch.index(i)}.json").unlink()
                batches = [[i] for i in begun] + ([waiting] if waiting else []) + batches
            else:
                done |= {i: _killed(list(jobs[i]), crash) for i in begun + waiting}
            done |= ended
            busy = {i: report.busy for i, report in ended.items() if report.busy}
            if busy:
                batches.append(list(busy))
            if len(batches) == 1 and busy:  # nothing else is left
                _wait(busy)
    return [done[i] for i in sorted(done)]


def _launched(launch: Launch, jobs: list[Sequence[str]], first: int) -> Exception | None:
    """Launch jobs; returns what the launcher gave up with."""
    try:
        launch(jobs, initial_job_idx=first)
    except Exception as error:
        return error
    return None


def _killed(overrides: list[str], crash: Exception | None) -> Report:
    why = f" ({_line(crash)})" if crash is not None else ""
    return Report(overrides, failed=[Failed(overrides, f"the process of a job was killed{why}")])


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def _wait(busy: dict[int, list[Path]]) -> None:
    """Wait until one of the jobs can go on."""
    while not any(all(map(is_free, folders)) for folders in busy.values()):
        time.sleep(WAIT)


class _Show:
    """Says on standard error what jobs have ended, with a bar on a terminal."""

    def __init__(self, jobs: int, folder: Path) -> None:
        self.jobs, self.folder = jobs, folder
        self.seen: set[Path] = set()
        self.said: set[str] = set()
        self.told: list[list[str]] = []  # the jobs of which it was said how they ended
        console = Console(file=sys.stderr, highlight=False)
        self.bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("", total=jobs)

    def say(self, text: str) -> None:
        """Print a line, unless it has been said."""
        if text not in self.said:
            self.bar.console.print(text, soft_wrap=True, markup=False)
            self.said.add(text)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look for reports, in a thread of its own, for as long as the context lasts."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(LOOK):
                self.look()

        thread = threading.Thread(target=watch, daemon=True)
        with self.bar:
            thread.start()
            try:
                yield
            finally:
                over.set()
                thread.join()
                self.look()

    def look(self) -> None:
        """Say what the jobs that have ended since the last look have to say."""
        new = {path for path in self.folder.glob("*.json") if path not in self.seen}
        for path in sorted(new, key=lambda path: int(path.stem)):
            report = read_report(self.folder, int(path.stem))
            if report is None or not report.ended:
                continue
            self.seen.add(path)
            if report.busy:
                self.say(left(report.busy[0]))
                continue
            if report.overrides in self.told:  # it outlived its launcher, and was launched again
                continue
            self.told.append(report.overrides)
            *notes, last = report.lines if report.runs else [*report.lines, ""]
            for note in notes:
                self.say(note)
            for text in [last, *(f"failed: {one.message}" for one in report.failed)]:
                if text:
                    self.say(f"[{len(self.told)}/{self.jobs}] {text}")
            self.bar.update(self.task, completed=len(self.told))
