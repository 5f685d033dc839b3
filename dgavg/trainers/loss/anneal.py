"""What penalties whose weight jumps at a step have in common."""

from __future__ import annotations

from dgavg.run import Run


def annealed(run: Run, weight: float, jump: int) -> float:
    """The weight at this step: 1 before step `jump`, then `weight`, as in DomainBed."""
    return weight if run.t >= jump else 1.0


def reset_at(run: Run, jump: int) -> None:
    """Forget the optimizer's moments where the weight jumps: they belong to another loss."""
    if run.t == jump:
        run.reset_optimizer()
