"""LossValley: SWAD, the mean of all weights in the valley of the validation loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from dgavg.averaging.convex import ConvexMean
from dgavg.averaging.parameters import Named
from dgavg.averaging.valley_rules import RULES, Sums, empty_like


class LossValley(ConvexMean):
    """The mean of the weights between the points where a loss is lowest and where it has risen.

    SWAD (Cha et al. 2021, arXiv 2102.08604): call `update` after each optimizer step and
    `evaluated(model, loss)` with each validation loss of the model itself, not of the average.

    `rule="paper"`: the valley begins at the first evaluation whose loss is the lowest of the next
    `n_converge` (3), itself included, and ends before the first `n_tolerance` (6) losses in a row
    above (1 + `tolerance_ratio`) times that loss (0.3; the authors take 0.2 for VLCS), or else with
    training. The average is that of all weights from those at its first evaluation to those at its
    last.

    `rule="code"`: as the authors' code, which differs. The tolerance is relative to the mean of
    the first `n_converge` losses; the weights between two evaluations are one segment, and segments
    count the same; up to n_tolerance − n_converge segments before the beginning count, too; and
    some count twice, or the first one not at all.

    Until a valley has been found the average is that of the newest segment. Weights taken in since
    the last evaluation are in no valley yet. An evaluation with nothing taken in since the last one
    is ignored, and all that comes after `ended`. NaN counts as infinite; with rule `paper` such a
    loss ends the valley at once.

    Other options: see `WeightAverage`. Memory: `max(n_tolerance, n_converge, 3)` models in float32
    at most, of which rule `paper` needs 3; 1 when the valley has ended; before, 1 more for what
    `weights()` returns.

    Raises `ValueError` for settings out of range and a loss below 0.
    """

    def __init__(
        self,
        source: nn.Module | Named,
        *,
        n_converge: int = 3,
        n_tolerance: int = 6,
        tolerance_ratio: float = 0.3,
        rule: str = "paper",
        **options: Any,
    ) -> None:
        for name, value in (("n_converge", n_converge), ("n_tolerance", n_tolerance)):
            if not (1 <= value < math.inf and value == int(value)):
                raise ValueError(f"{name}={value}: a number of evaluations from 1 on")
        if not 0 <= tolerance_ratio < math.inf:
            raise ValueError(f"tolerance_ratio={tolerance_ratio}: a share of the loss from 0 on")
        if rule not in RULES:
            raise ValueError(f"rule={rule!r}: choose one of {', '.join(RULES)}")
        self.sums = Sums()
        self._settings = (int(n_converge), int(n_tolerance), float(tolerance_ratio))
        self.rule = RULES[rule](*self._settings)
        super().__init__(source, **options)

    @property
    def ended(self) -> bool:
        """Whether the valley has ended, so that the average will not change any more."""
        return self.rule.ended

    def update(self, source: nn.Module | Named) -> None:
        """Take in the weights that `source` has now, unless the valley has ended."""
        if not self.ended:
            super().update(source)

    @torch.no_grad()
    def evaluated(self, source: nn.Module | Named, loss: float) -> None:
        """Tell the validation loss of the weights that `source` has now.

        Raises `ValueError` for a loss below 0, which no share of it could bound.
        """
        loss = float(loss)
        if loss < 0:
            raise ValueError(f"loss={loss}: a loss from 0 on, as its rise is measured by a share")
        if self.ended or not self.sums.counts.get("segment"):
            return
        live, _ = self.tracked.peek(source)
        self.rule.judge(self.sums, math.inf if math.isnan(loss) else loss, live)
        self._point_at_segment()

    def rate(self) -> float:
        """1/(n + 1) after n weights since the last evaluation."""
        return 1.0 / (self.sums.counts["segment"] + 1)

    def blend(self, other: ConvexMean, rate: float) -> NoReturn:
        """Raises `ValueError`: a valley takes in weights, and a loss that speaks for them."""
        raise ValueError("a valley can't be blended: take its weights into a RunningMean")

    def restart(self) -> None:
        """Forget everything: the next weights are the first."""
        super().restart()
        self.rule = type(self.rule)(*self._settings)
        name = next(iter(self.sums.means))
        self.sums.put("segment", self.sums.means[name], 0)
        self.sums.keep("segment")
        self._point_at_segment()

    def _point_at_segment(self) -> None:
        """The lerp of an update goes into the segment; room for a new one is made by its first."""
        self._mean, self._seen = self.sums.means.get("segment", []), None

    def _allocate(self, live: list[Tensor]) -> None:
        super()._allocate(live)
        self.sums.put("segment", self._mean, 0)

    def _follow(self, live: list[Tensor]) -> None:
        for name in self.sums.means:
            self._mean = self.sums.means[name]
            super()._follow(live)
            self.sums.means[name] = self._mean
        self._point_at_segment()

    def _take(self, live: list[Tensor]) -> None:
        if "segment" not in self.sums.means:
            other = next(iter(self.sums.means.values()))
            self.sums.put("segment", empty_like(other), 0)
            self._point_at_segment()
        super()._take(live)
        self.sums.counts["segment"] += 1

    @torch.no_grad()
    def _means(self) -> list[Tensor]:
        return self.sums.mean(self.rule.answer(self.sums))

    def _identity(self) -> dict[str, Any]:
        rule = next(name for name, kind in RULES.items() if kind is type(self.rule))
        return {**super()._identity(), "rule": rule}

    def _stored(self) -> dict[str, Tensor]:
        return {
            f"{part}/{name}": tensor
            for part, mean in self.sums.means.items()
            for name, tensor in zip(self.tracked.averaged, mean, strict=True)
        }

    def state_dict(self) -> dict[str, Any]:
        """Counters and tensors, as aliases."""
        counts = dict(self.sums.counts)
        return {**super().state_dict(), "counts": counts, "rule": self.rule.state_dict()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; room is made for as many sums as that holds.

        Raises `ValueError` for the state of another model, another rule or another average.
        """
        self._check_state(saved)
        rule = type(self.rule)(*self._settings)
        rule.load_state_dict(saved["rule"])
        before, self.sums = self.sums, Sums()
        like = next(iter(before.means.values()))
        for name, count in saved["counts"].items():
            self.sums.put(name, before.means.get(name) or empty_like(like), count)
        try:
            super().load_state_dict(saved)
        except ValueError:
            self.sums = before
            raise
        self.rule = rule
        self._point_at_segment()
