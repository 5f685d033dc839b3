"""What the averages that keep a shadow of the weights have in common."""

from __future__ import annotations

import math

from dgavg.averaging import WeightAverage
from dgavg.errors import require
from dgavg.trainer import POLICIES, Candidate


def buffers_for(policy: str) -> str:
    """What an average does with buffers under a batch-norm policy."""
    return "average" if policy == "average" else "copy"


def check_shadow(name: str, start: float, every: int, policy: str) -> None:
    """Raise `UserError` for settings that no average can have."""
    require(
        start >= 0 and math.isfinite(start),
        f"trainer.{name}.start={start}: a share of the run below 1, or a step from 1 on",
    )
    require(every >= 1, f"trainer.{name}.every={every}: at least 1")
    require(
        policy in POLICIES,
        f"trainer.{name}.batchnorm={policy!r}: choose one of {', '.join(POLICIES)}",
    )


def offer(name: str, average: WeightAverage | None, policy: str) -> dict[str, Candidate]:
    """The average as a candidate, once there is one."""
    if average is None or average.count == 0:
        return {}
    return {name: Candidate(average.weights(), policy)}
