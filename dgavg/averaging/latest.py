"""LatestMean: the mean of the last k weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from dgavg.averaging.average import WeightAverage
from dgavg.averaging.parameters import Named, common, wide
from dgavg.averaging.rows import Rows


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
        kinds = [(t.dtype, device) for t, device in zip(live, self._devices(live), strict=True)]
        self._latest = Rows(self.k, live, kinds, [True] * len(live))

    def _follow(self, live: list[Tensor]) -> None:
        now = [(t.dtype, t.device) for t in self._latest.row(0)]
        kinds = [
            (common(dtype, t.dtype), device)
            for (dtype, _), t, device in zip(now, live, self._devices(live), strict=True)
        ]
        if kinds != now:
            before = self._latest
            self._latest = Rows(self.k, live, kinds, [True] * len(live))
            self._latest.take(before)

    def _take(self, live: list[Tensor]) -> None:
        if live:
            torch._foreach_copy_(self._latest.row(self.count % self.k), live)

    @torch.no_grad()
    def _means(self) -> list[Tensor]:
        n = min(self.count, self.k)
        means = [t.to(wide(t.dtype), copy=True) for t in self._latest.row(0)]
        for i in range(1, n):
            for mean, t in zip(means, self._latest.row(i), strict=True):
                mean.lerp_(t.to(mean.dtype), 1 / (i + 1))
        return means

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "k": self.k}

    def _stored(self) -> dict[str, Tensor]:
        return {}

    def _history(self, count: int) -> dict[str, Tensor]:
        rows = self._latest.first(min(count, self.k))
        return {f"latest/{k}": t for k, t in zip(self.tracked.averaged, rows, strict=True)}
