"""What a user sees while runs train: a bar on a terminal, a line a run elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from dgavg.benchmark.results import test_score
from dgavg.distributed import is_first
from dgavg.evaluation.selection import selected_step
from dgavg.fit import FLUSH
from dgavg.run import Run


class Watcher:
    """Shows the fold, the rate of steps, the loss and the time left, on standard error.

    A context manager around all runs of a chain; `start` and `end` stand around each of them.
    With `tell`, a function of a line, there is no bar, and all lines go to it.
    """

    def __init__(
        self,
        title: str,
        runs: int,
        steps: int,
        *,
        quiet: bool = False,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self.title, self.runs, self.steps, self.quiet = title, runs, steps, quiet
        self.tell = tell
        self.console = Console(file=sys.stderr, highlight=False, quiet=not is_first())
        self.bar = Progress(
            TextColumn(title),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[figures]}"),
            console=self.console,
            transient=True,
            disable=quiet or tell is not None or not self.console.is_terminal,
        )
        self.task = self.bar.add_task("", total=runs * steps, figures="")
        self.done, self.label = 0, ""
        self.began = self.stepped = self.shown = 0.0  # seconds: of the run, its first step, a look
        self.first = -1  # the first step that was taken here
        self.at_once = 1  # runs side by side

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
        if self.tell is not None:
            self.tell(text)
        else:
            self.console.print(text, soft_wrap=True, markup=False)

    def start(self, label: str, at_once: int = 1) -> None:
        """A run begins, or several at once."""
        self.began, self.first, self.at_once = time.perf_counter(), -1, at_once
        self.name(label)

    def name(self, label: str) -> None:
        """Show which run this is."""
        self.label = label + (f" [{self.done + 1}/{self.runs}]" if self.tell is None else "")
        self.bar.update(self.task, description=self.label)  # the figures of the last run stay

    def __call__(self, run: Run) -> None:
        """A step has been taken."""
        now = time.perf_counter()
        if self.first < 0:
            self.first, self.stepped = run.t, now
        elif run.t % FLUSH == 0 or now - self.shown > 1:
            self.shown = now
            rate = (run.t - self.first) / (now - self.stepped)
            done = self.done * self.steps + run.t * self.at_once
            left = timedelta(seconds=round((self.runs * self.steps - done) / rate / self.at_once))
            loss = f"loss {run.losses.last:.3f}  " if math.isfinite(run.losses.last) else ""
            figures = f"{rate:.{0 if rate >= 10 else 1}f} steps/s  {loss}{left} left"
            self.bar.update(self.task, completed=done, figures=figures)

    def end(self, records: Sequence[Mapping[str, Any]]) -> None:
        """A run has ended, just now or long ago."""
        self.done += 1
        self.bar.update(self.task, completed=self.done * self.steps)
        if self.quiet or (self.tell is None and self.console.is_terminal):
            return
        last = records[-1]
        rule, steps = last["protocol"]["selection"], last["protocol"]["steps"]
        found = []
        for name in last["candidates"]:
            index = selected_step(records, name, rule)
            shown = last if index is None else records[index]  # by `loo`, other runs decide
            found.append(f"{name} {100 * test_score(shown, name)[0]:.1f}")
        seconds = time.perf_counter() - self.began
        took = f"{seconds:.1f} s" if self.first >= 0 else "done before"
        took += f" for {self.at_once} at once" if self.first >= 0 and self.at_once > 1 else ""
        early = f", stopped at step {last['step']}" if last["step"] < steps else ""
        self.note(f"{self.title}, {self.label}: {', '.join(found)} ({took}{early})")
