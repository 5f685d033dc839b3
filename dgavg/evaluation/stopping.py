"""Early stopping on a candidate's validation loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dgavg.errors import require
from dgavg.trainer import Scores


@dataclass(frozen=True)
class Stopping:
    """Stop once `candidate` has gone `patience` evaluations without a lower validation loss.

    A pure function of the scores so far, so there is nothing to save. `candidate=None` never stops.

    Raises `UserError` for a patience below 1.
    """

    candidate: str | None = None
    patience: int = 5

    def __post_init__(self) -> None:
        require(self.patience >= 1, f"stopping.patience={self.patience}: at least 1 evaluation")

    def __call__(self, scores: Sequence[Scores]) -> str:
        """Why to stop now, or ""."""
        name = self.candidate
        losses = [s[name]["loss"] for s in scores if name in s] if name is not None else []
        if not losses:
            return ""
        losses = [math.inf if math.isnan(loss) else loss for loss in losses]
        since = len(losses) - 1 - losses.index(min(losses))
        if since < self.patience:
            return ""
        return f"the validation loss of {self.candidate!r} has not fallen for {since} evaluations"
