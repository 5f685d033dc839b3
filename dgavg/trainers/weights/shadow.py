"""What the averages that keep a shadow of the weights have in common."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Protocol

from dgavg.averaging import WeightAverage
from dgavg.errors import require
from dgavg.run import Run
from dgavg.trainer import POLICIES, Candidate


class Shadow(Protocol):
    """A link that averages from `start` on, `every` so often."""

    name: ClassVar[str]
    start: float
    every: int
    batchnorm: str


def check_shadow(link: Shadow) -> None:
    """Raise `UserError` for settings that no average can have."""
    require(
        link.start >= 0 and math.isfinite(link.start),
        f"trainer.{link.name}.start={link.start}: a share of the run below 1, or a step from 1 on",
    )
    require(link.every >= 1, f"trainer.{link.name}.every={link.every}: at least 1")
    require(
        link.batchnorm in POLICIES,
        f"trainer.{link.name}.batchnorm={link.batchnorm!r}: choose one of {', '.join(POLICIES)}",
    )


def by_step(link: Shadow, run: Run) -> dict[str, Any]:
    """The options of an average that is updated after every step."""
    first = max(run.step_of(link.start, f"trainer.{link.name}.start"), 1)
    return {"start": first - 1, "interval": link.every, **buffers_of(link, run)}


def by_epoch(link: Shadow, run: Run, fewest: int = 1) -> dict[str, Any]:
    """The options of an average that is updated after every epoch.

    Raises `UserError` where fewer than `fewest` updates would count.
    """
    first, length = run.step_of(link.start, f"trainer.{link.name}.start"), run.epoch_length
    before = max(-(-first // length) - 1, 0)
    count = epochs_that_count(link, run, before)
    require(
        count >= fewest,
        f"{link.name} averages at the ends of epochs, but {'none' if count < 1 else count} of "
        f"{length} steps ends from step {first} to {run.steps}: train longer, lower "
        f"trainer.{link.name}.start, or use sma",
    )
    return {"start": before, "interval": link.every, **buffers_of(link, run)}


def epochs_that_count(link: Shadow, run: Run, before: int) -> int:
    """How many ends of epochs an average takes in that begins after the first `before`."""
    return -(-(run.steps // run.epoch_length - before) // link.every)


def buffers_of(link: Shadow, run: Run) -> dict[str, Any]:
    """What the link's average does with the model's buffers under its batch-norm policy."""
    buffers = "average" if link.batchnorm == "average" else "copy"
    return {"buffers": buffers, "buffer_names": run.buffer_names}


def offer(link: Shadow, average: WeightAverage | None) -> dict[str, Candidate]:
    """The average as a candidate, once there is one."""
    if average is None or average.count == 0:
        return {}
    return {link.name: Candidate(average.weights(), link.batchnorm)}
