"""What penalties whose weight jumps at a step have in common."""

from __future__ import annotations

import math

from dgavg.errors import require
from dgavg.run import Run
from dgavg.trainer import Schedule


def check_weight(name: str, weight: Schedule) -> None:
    """Raise `UserError` for a weight that is no finite number from 0 on."""
    require(
        callable(weight) or (math.isfinite(weight) and weight >= 0),
        f"trainer.{name}.weight={weight}: a finite number from 0 on",
    )


def annealed(run: Run, weight: Schedule, jump: int) -> float:
    """The weight at this step: 1 before step `jump`, then `weight`, as in DomainBed."""
    return run.at(weight) if run.t >= jump else 1.0


def reset_at(run: Run, jump: int) -> None:
    """Forget the optimizer's moments where the weight jumps: they belong to another loss."""
    if run.t == jump:
        run.reset_optimizer()
