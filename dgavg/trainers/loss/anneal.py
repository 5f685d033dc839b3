"""What penalties whose weight jumps at a step have in common."""

from __future__ import annotations

import math

from dgavg.run import Run
from dgavg.trainer import Trainer


def jump_of(link: Trainer, run: Run, anneal: str = "anneal", weight: str = "weight") -> int:
    """The step at which the setting `weight` begins to act; 0 where it follows a schedule.

    An infinite `anneal` is never, a step after the last. Raises `UserError` for another one past
    the end of the run.
    """
    if weight in link.scheduled:
        return 0
    step: float = getattr(link, anneal)
    never = step == math.inf
    return run.steps + 1 if never else run.step_of(step, f"trainer.{link.name}.{anneal}")


def annealed(run: Run, weight: float, jump: int, before: float = 1.0) -> float:
    """The weight at this step: `before` until step `jump`, then `weight`, as in DomainBed."""
    return weight if run.t >= jump else before


def reset_at(run: Run, jump: int) -> None:
    """Forget the optimizer's moments where the weight jumps: they belong to another loss."""
    if run.t == jump:
        run.reset_optimizer()
