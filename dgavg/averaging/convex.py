"""ConvexMean: averages that move towards the newest weights, by one lerp an update."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from dgavg.averaging.average import WeightAverage
from dgavg.averaging.flat import as_one, groups, side_by_side
from dgavg.averaging.parameters import wide

CHUNK = 1 << 22  # numbers converted at once where model and average differ in dtype or device


class ConvexMean(WeightAverage):
    """An average a ← a + r·(w − a); a subclass says the rate r.

    Memory: 1 model in float32, and where the model is in another dtype or on another device than
    the average, its largest parameter (16 MiB at least) in an update.
    """

    _mean: list[Tensor]
    _seen: list[Tensor] | None = None  # the live tensors that what follows belongs to
    _targets: list[Tensor]
    _sources: list[Tensor]
    _alike: bool  # in dtype and device

    @abstractmethod
    def rate(self) -> float:
        """The weight of the newest model in the next update, in [0, 1]."""

    @torch.no_grad()
    def blend(self, other: ConvexMean, rate: float) -> None:
        """Move towards another average of the same model: a ← a + rate·(b − a).

        Counts as an update; into an average that has none yet, the other is copied.
        """
        other.check_started()
        rate = rate if self.count else 1.0
        if self._mean:
            torch._foreach_lerp_(self._mean, other._mean, rate)
        if self._copied:
            torch._foreach_copy_(self._copied, other._copied)
        self.count += 1
        self.calls += 1

    def _allocate(self, live: list[Tensor]) -> None:
        self._mean = []
        for group in groups(live):
            part = [live[i] for i in group]
            device = self.device or part[0].device
            self._mean += side_by_side(part, wide(part[0].dtype), device)

    def _follow(self, live: list[Tensor]) -> None:
        self._mean = [
            m.to(self.device or t.device, torch.promote_types(m.dtype, t.dtype))
            for m, t in zip(self._mean, live, strict=True)
        ]

    def _take(self, live: list[Tensor]) -> None:
        if live is not self._seen:
            self._match(live)
        rate = self.rate() if self.count else 1.0
        for means, tensors in self._batches():
            if rate == 1.0:
                torch._foreach_copy_(means, tensors)
            else:
                torch._foreach_lerp_(means, tensors, rate)

    def _match(self, live: list[Tensor]) -> None:
        """Pair averages with live tensors; neighbours in memory on both sides become one."""
        self._targets, self._sources, self._seen = [], [], live
        for group in groups(live):
            means, tensors = [self._mean[i] for i in group], [live[i] for i in group]
            alike = all(m.stride() == t.stride() for m, t in zip(means, tensors, strict=True))
            if len(group) > 1 and alike and len(groups(means)) == 1:
                means, tensors = [as_one(means)], [as_one(tensors)]
            self._targets += means
            self._sources += tensors
        self._alike = all(
            m.dtype == t.dtype and m.device == t.device
            for m, t in zip(self._targets, self._sources, strict=True)
        )

    def _batches(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Averages and the live tensors as they fit them: all at once, or converted in turns."""
        if self._alike:
            if self._targets:
                yield self._targets, self._sources
            return
        means: list[Tensor] = []
        tensors: list[Tensor] = []
        for m, t in zip(self._targets, self._sources, strict=True):
            means.append(m)
            tensors.append(t.to(m.device, m.dtype))
            if sum(map(torch.numel, means)) >= CHUNK:
                yield means, tensors
                means, tensors = [], []
        if means:
            yield means, tensors

    def _means(self) -> list[Tensor]:
        return self._mean

    def _stored(self) -> dict[str, Tensor]:
        return dict(zip(self.tracked.averaged, self._mean, strict=True))
