"""ValidatedMean: ASWA, an average that takes in only what a validation metric speaks for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dgavg.averaging.convex import ConvexMean
from dgavg.averaging.pairs import Pairs
from dgavg.averaging.parameters import Named
from dgavg.averaging.tracked import Policy
from dgavg.averaging.valley_rules import empty_like


class ValidatedMean(ConvexMean):
    """The mean of the weights that a metric on validation data found worth taking in.

    ASWA (Demir et al. 2024, arXiv 2406.19092). Now and then, as after an epoch, score the model
    and the lookahead, which is the average with the model taken in, and let the scores decide:

        ahead = mean.lookahead(model)
        mean.decide(model, live=score(model), lookahead=score(ahead))

    - `first`: there is no average yet, and the model becomes it.
    - `hard`: the model beats both the lookahead and the average, which starts again from it. The
      authors' own code has no such step: `hard=False`.
    - `soft`: the lookahead beats the average and becomes it, to the bit as it was scored.
    - `reject`: nothing changes. Ties are rejections, and so are comparisons with NaN.

    A higher metric is better, a lower one with `lower=True`. `metric` is that of the average when
    it last changed by a decision. `update` takes weights in without asking. For `device`,
    `buffers` and `buffer_names` see `WeightAverage`. Memory: 2 models in float32.
    """

    def __init__(
        self,
        source: nn.Module | Named,
        *,
        hard: bool = True,
        lower: bool = False,
        device: torch.device | str | None = None,
        buffers: Policy | None = None,
        buffer_names: frozenset[str] | None = None,
    ) -> None:
        self.hard, self.lower = hard, lower
        self.metric: float | None = None
        self._ahead: list[Tensor] = []
        self._scored = False  # what `_ahead` holds is the lookahead of the next decision
        super().__init__(source, device=device, buffers=buffers, buffer_names=buffer_names)

    def rate(self) -> float:
        """1/(n + 1) after n models."""
        return 1.0 / (self.count + 1)

    def update(self, source: nn.Module | Named) -> None:
        """Take in the weights that `source` has now without asking; no metric is known then."""
        super().update(source)
        self.metric, self._scored = None, False

    def blend(self, other: ConvexMean, rate: float) -> None:
        """As that of `ConvexMean`; no metric is known then, and a lookahead is out of date."""
        super().blend(other, rate)
        self.metric, self._scored = None, False

    @torch.no_grad()
    def lookahead(self, source: nn.Module | Named) -> dict[str, Tensor]:
        """The average with the weights of `source` taken in, by name; the average stays as it is.

        Borrowed memory, until the next lookahead.
        """
        live, copied = self.tracked.peek(source)
        self._ahead = self._ahead or empty_like(self._mean)
        Pairs(self._ahead, self._mean).copy()
        average, self._mean = self._mean, self._ahead
        try:
            self._take(live)
        finally:
            self._mean = average
        self._scored = True
        found = self.tracked.named(self._ahead, copied)
        return {k: v for k, v in found.items() if k not in self.tracked.unsaved}

    @torch.no_grad()
    def decide(
        self,
        source: nn.Module | Named,
        *,
        live: float,
        lookahead: float | None = None,
        average: float | None = None,
    ) -> str:
        """Change the average as the metrics say; returns `first`, `hard`, `soft` or `reject`.

        `live` is the metric of the weights that `source` has now, `lookahead` that of what
        `lookahead` gave (none where there is no average yet), `average` that of the average, by
        default its own `metric`.

        Raises `ValueError` for a metric that is missing.
        """
        done, metric = self._choose(live, lookahead, average)
        if done == "soft":
            self._accept_lookahead(source)
        elif done != "reject":
            self.restart()
            self.update(source)
        self.metric, self._scored = metric, False
        return done

    def _choose(
        self, live: float, lookahead: float | None, average: float | None
    ) -> tuple[str, float | None]:
        """What to do, and the metric of the average afterwards."""
        if self.count == 0:
            return ("reject", self.metric) if math.isnan(live) else ("first", live)
        if lookahead is None:
            raise ValueError("lookahead=None: give the metric of what `lookahead` returned")
        best, sign = self.metric if average is None else average, -1.0 if self.lower else 1.0
        if best is None:
            raise ValueError("average=None: give the metric of the average, it is not known yet")
        if self.hard and sign * live > sign * lookahead and sign * live > sign * best:
            return "hard", live
        return ("soft", lookahead) if sign * lookahead > sign * best else ("reject", self.metric)

    def _accept_lookahead(self, source: nn.Module | Named) -> None:
        self._find(source)
        if not self._scored:
            self.lookahead(source)
        self._mean, self._ahead = self._ahead, self._mean
        self._copying.copy()
        self.count += 1
        self.calls += 1

    def restart(self) -> None:
        """Forget everything averaged so far: the next weights are the first."""
        super().restart()
        self.metric = None

    def _follow(self, live: list[Tensor]) -> None:
        super()._follow(live)
        if self._ahead:
            average, self._mean = self._mean, self._ahead
            super()._follow(live)
            self._ahead, self._mean = self._mean, average

    def state_dict(self) -> dict[str, Any]:
        """Counters, metric and tensors, as aliases."""
        return {**super().state_dict(), "metric": self.metric}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave, in place.

        Raises `ValueError` for the state of another model or another kind of average.
        """
        super().load_state_dict(saved)
        self.metric, self._scored = saved["metric"], False
