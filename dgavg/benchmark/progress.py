"""What a user sees while runs train: a bar on a terminal, a line a run elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from dgavg.benchmark.table import test_score
from dgavg.evaluation.selection import selected_step
from dgavg.fit import FLUSH
from dgavg.run import Run


class Watcher:
    """Shows the fold, the rate of steps, the loss and the time left, on standard error.

    A context manager around all runs of a chain; `start` and `end` stand around each of them.
    """

    def __init__(self, title: str, runs: int, steps: int, *, quiet: bool = False) -> None:
        self.runs, self.steps, self.quiet = runs, steps, quiet
        self.console = Console(file=sys.stderr, highlight=False)
        self.bar = Progress(
            TextColumn(title),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[rate]:.0f} steps/s  loss {task.fields[loss]:.3f}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=quiet or not self.console.is_terminal,
        )
        self.task = self.bar.add_task("", total=runs * steps, rate=0.0, loss=float("nan"))
        self.done, self.began, self.first = 0, time.perf_counter(), 0

    def __enter__(self) -> Watcher:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, soft_wrap=True, markup=False)

    def start(self, held_out: str, seed: int) -> None:
        """A run begins."""
        self.began, self.first = time.perf_counter(), -1
        self.label = f"hold out {held_out}, seed {seed} [{self.done + 1}/{self.runs}]"
        self.bar.update(self.task, description=self.label)

    def __call__(self, run: Run) -> None:
        """A step has been taken."""
        if self.first < 0:
            self.first = run.t - 1
        if run.t % FLUSH == 0:
            rate = (run.t - self.first) / (time.perf_counter() - self.began)
            done = self.done * self.steps + run.t
            self.bar.update(self.task, completed=done, rate=rate, loss=run.losses.last)

    def end(self, records: Sequence[Mapping[str, Any]]) -> None:
        """A run has ended, just now or long ago."""
        self.done += 1
        self.bar.update(self.task, completed=self.done * self.steps)
        if self.quiet or self.console.is_terminal:
            return
        rule, last = records[-1]["protocol"]["selection"], records[-1]
        found = []
        for name in last["candidates"]:
            index = selected_step(records, name, rule)
            assert index is not None  # it is in the last record
            found.append(f"{name} {100 * test_score(records[index], name)[0]:.1f}")
        seconds = time.perf_counter() - self.began
        took = f"{seconds:.1f} s" if self.first >= 0 else "done before"
        self.note(f"{self.label}: {', '.join(found)} ({took})")
