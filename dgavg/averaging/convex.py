"""ConvexMean: averages that move towards the newest weights, by one lerp an update."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from dgavg.averaging.average import WeightAverage
from dgavg.averaging.pairs import Pairs, moved, room
from dgavg.averaging.parameters import check_same, common, wide


class ConvexMean(WeightAverage):
    """An average a ← a + r·(w − a); a subclass says the rate r.

    Memory: 1 model in float32, and where the model is in another dtype or on another device than
    the average, 16 MiB in an update (or its largest tensor with gaps in its memory).
    """

    _mean: list[Tensor]
    _seen: Pairs | None = None  # the averages with the live tensors seen last

    @abstractmethod
    def rate(self) -> float:
        """The weight of the newest model in the next update, in [0, 1]."""

    @torch.no_grad()
    def blend(self, other: ConvexMean, rate: float) -> None:
        """Move towards another average of the same model: a ← a + rate·(b − a).

        Counts as an update; into an average that has none yet, the other is copied.

        Raises `ValueError` for an average of another model, and a rate outside [0, 1].
        """
        other.check_started()
        if not 0 <= rate <= 1:
            raise ValueError(f"rate={rate}: a number from 0 to 1")
        check_same(self.tracked.like, other.tracked.like)
        if self.tracked.averaged != other.tracked.averaged:
            raise ValueError("one copies what the other averages: give both the same buffers")
        pairs = Pairs(self._mean, other._means())
        if self.count:
            pairs.lerp(rate)
        else:
            pairs.copy()
        Pairs(self._copied, other._copied).copy()
        self.count += 1
        self.calls += 1

    def _allocate(self, live: list[Tensor]) -> None:
        self._mean = room(live, [wide(t.dtype) for t in live], self._devices(live))

    def _follow(self, live: list[Tensor]) -> None:
        dtypes = [common(m.dtype, t.dtype) for m, t in zip(self._mean, live, strict=True)]
        self._mean = moved(self._mean, live, dtypes, self._devices(live))

    def _take(self, live: list[Tensor]) -> None:
        pairs = self._seen
        if pairs is None or pairs.sources is not live or pairs.targets is not self._mean:
            pairs = self._seen = Pairs(self._mean, live)
        rate = self.rate() if self.count else 1.0
        if rate == 1.0:
            pairs.copy()
        else:
            pairs.lerp(rate)

    def _means(self) -> list[Tensor]:
        return self._mean

    def _stored(self) -> dict[str, Tensor]:
        return dict(zip(self.tracked.averaged, self._mean, strict=True))
