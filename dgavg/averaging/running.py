"""RunningMean: every weight counts the same."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from dgavg.averaging.convex import ConvexMean
from dgavg.averaging.parameters import Named


class RunningMean(ConvexMean):
    """The mean of all weights taken in: a ← a + (w − a)/(n + 1).

    The average of SWA (Izmailov et al. 2018, arXiv 1803.05407) and, taken every step, of SMA (Arpit
    et al. 2022, arXiv 2110.10832). `first_count` is how many models the first one counts for.
    Other options: see `WeightAverage`; memory: see `ConvexMean`.
    """

    def __init__(self, source: nn.Module | Named, *, first_count: int = 1, **options: Any) -> None:
        super().__init__(source, **options)
        if not 1 <= first_count < math.inf:
            raise ValueError(f"first_count={first_count}: at least 1")
        self.first_count = first_count

    def rate(self) -> float:
        """1/(n + 1) after n models."""
        return 1.0 / (self.count + self.first_count)
