"""ExponentialMean: the past fades by a constant factor."""

from __future__ import annotations

from typing import Any

from torch import nn

from dgavg.averaging.average import WeightAverage
from dgavg.averaging.parameters import Named


class ExponentialMean(WeightAverage):
    """The exponential moving average a ← d·a + (1 − d)·w, started at the first weights taken in.

    Tarvainen and Valpola 2017, arXiv 1703.01780. `decay` d in [0, 1) remembers about 1/(1 − d)
    updates.
    """

    def __init__(self, source: nn.Module | Named, *, decay: float = 0.999, **options: Any) -> None:
        super().__init__(source, **options)
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay}: a number in [0, 1)")
        self.decay = decay

    def rate(self) -> float:
        """1 − d."""
        return 1.0 - self.decay
