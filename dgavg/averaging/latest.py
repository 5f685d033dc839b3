"""LatestMean: the mean of the last k weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from dgavg.averaging.average import WeightAverage
from dgavg.averaging.pairs import moved, room
from dgavg.averaging.parameters import Named, common, wide


class LatestMean(WeightAverage):
    """The mean of the `k` latest weights taken in: LAWA (Kaddour 2022, arXiv 2209.14981).

    While there are fewer, the mean of those. Nothing is added up as it goes, so nothing drifts.
    Other options: see `WeightAverage`. Memory: k models in the model's dtype; `weights()` makes 1
    more in float32, and where the model is narrower what it gives besides.

    Raises `ValueError` for a `k` below 1.
    """

    def __init__(self, source: nn.Module | Named, *, k: int = 6, **options: Any) -> None:
        if not (1 <= k < math.inf and k == int(k)):
            raise ValueError(f"k={k}: a number of models from 1 on")
        self.k = int(k)
        super().__init__(source, **options)

    def _allocate(self, live: list[Tensor]) -> None:
        dtypes = [t.dtype for t in live]
        self._latest: list[list[Tensor]] = [
            room(live, dtypes, self._devices(live)) for _ in range(self.k)
        ]

    def _follow(self, live: list[Tensor]) -> None:
        kept = self._latest[0]
        dtypes = [common(m.dtype, t.dtype) for m, t in zip(kept, live, strict=True)]
        self._latest = [moved(m, live, dtypes, self._devices(live)) for m in self._latest]

    def _take(self, live: list[Tensor]) -> None:
        if live:
            torch._foreach_copy_(self._latest[self.count % self.k], live)

    @torch.no_grad()
    def _means(self) -> list[Tensor]:
        n = min(self.count, self.k)
        means = [t.to(wide(t.dtype), copy=True) for t in self._latest[0]]
        for i, kept in enumerate(self._latest[1:n], start=1):
            for mean, t in zip(means, kept, strict=True):
                mean.lerp_(t.to(mean.dtype), 1 / (i + 1))
        return means

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "k": self.k}

    def _stored(self) -> dict[str, Tensor]:
        return {
            f"{i}/{name}": tensor
            for i, kept in enumerate(self._latest)
            for name, tensor in zip(self.tracked.averaged, kept, strict=True)
        }
