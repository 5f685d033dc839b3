"""ExponentialMean: the past fades by a factor, which may grow while training begins."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from dgavg.averaging.convex import ConvexMean
from dgavg.averaging.parameters import Named

WARMUPS = ("power", "count", "annealing", "exponential")


class ExponentialMean(ConvexMean):
    """The exponential moving average a ← d·a + (1 − d)·w, started at the first weights taken in.

    Tarvainen and Valpola 2017, arXiv 1703.01780. Say how long it remembers in one of three ways:

    - `decay` d in [0, 1): about 1/(1 − d) updates; 0.999 by default.
    - `momentum` = 1 − d, as mmengine counts it.
    - `half_life` in calls of `update`, whatever the `interval`: d = 0.5^(interval/half_life).

    A constant d keeps d^n of the first weights after n updates: 37 % after 1/(1 − d). Two remedies:

    - `bias_correction`: divide by 1 − d^n, as Adam does, in the form r = (1 − d)/(1 − d^(n+1)): the
      weights of all updates sum to 1, and the first has no more than its share.
    - `warmup`: a smaller d at first, s calls after the first that counts, never below `min_decay`
      nor above d. `power`: 1 − (1 + s/gamma)^−power (timm's ModelEmaV3 and ema-pytorch; gamma 1,
      power 2/3). `count`: (1 + s)/(10 + s) (TensorFlow, torch-ema). `annealing`:
      1 − gamma/(gamma + s) (mmengine; gamma 100). `exponential`: d·(1 − exp(−s/gamma))
      (ultralytics; gamma 2000).

    Other options: see `WeightAverage`; memory: see `ConvexMean`.

    Raises `ValueError` for settings out of range.
    """

    def __init__(
        self,
        source: nn.Module | Named,
        *,
        decay: float | None = None,
        momentum: float | None = None,
        half_life: float | None = None,
        bias_correction: bool = False,
        warmup: str | None = None,
        gamma: float | None = None,
        power: float = 2 / 3,
        min_decay: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(source, **options)
        self.decay = _decay(decay, momentum, half_life, self.interval)
        if self.decay == 1.0:
            raise ValueError(f"momentum={momentum}, half_life={half_life}: too long, d rounds to 1")
        if warmup is not None and warmup not in WARMUPS:
            raise ValueError(f"warmup={warmup!r}: choose one of {', '.join(WARMUPS)}, or None")
        if warmup is not None and bias_correction:
            raise ValueError("warmup and bias_correction both free it of the start: choose one")
        if warmup is None and (gamma is not None or min_decay):
            raise ValueError("gamma and min_decay belong to a warm-up: choose warmup=...")
        if warmup == "count" and gamma is not None:
            raise ValueError(f"gamma={gamma}: (1 + s)/(10 + s) has none")
        if warmup != "power" and power != 2 / 3:
            raise ValueError(f"power={power}: belongs to warmup='power'")
        if gamma is not None and not 0 < gamma < math.inf:
            raise ValueError(f"gamma={gamma}: a number above 0")
        if not 0 < power < math.inf:
            raise ValueError(f"power={power}: a number above 0")
        if not 0 <= min_decay <= self.decay:
            raise ValueError(f"min_decay={min_decay}: a number from 0 to the decay {self.decay}")
        self.bias_correction, self.warmup = bias_correction, warmup
        self.gamma, self.power, self.min_decay = gamma, power, min_decay

    def rate(self) -> float:
        """1 − d of the next update."""
        if self.bias_correction:
            return (1.0 - self.decay) / (1.0 - self.decay ** (self.count + 1))
        if self.warmup is None:
            return 1.0 - self.decay
        decay = warmup_decay(
            self.warmup, self.calls - self.start, self.decay, gamma=self.gamma, power=self.power
        )
        return 1.0 - min(max(decay, self.min_decay), self.decay)


class AnnealedMean(ExponentialMean):
    """mmengine's annealed average: momentum max(`momentum`, gamma/(gamma + calls)).

    A running mean at first, an exponential one later.
    """

    def __init__(
        self,
        source: nn.Module | Named,
        *,
        momentum: float = 0.0002,
        gamma: float = 100,
        **options: Any,
    ) -> None:
        super().__init__(source, momentum=momentum, warmup="annealing", gamma=gamma, **options)


def warmup_decay(
    kind: str, s: int, decay: float, *, gamma: float | None = None, power: float = 2 / 3
) -> float:
    """The decay of a warm-up `s` calls after the first that counts; see `ExponentialMean`.

    >>> [round(warmup_decay("power", s, 0.999), 3) for s in (0, 1, 10, 1000)]
    [0.0, 0.37, 0.798, 0.99]
    >>> [round(warmup_decay("annealing", s, 0.999), 3) for s in (0, 100, 900)]
    [0.0, 0.5, 0.9]
    """
    if kind == "power":
        return 1.0 - float((1.0 + s / (gamma or 1.0)) ** -power)
    if kind == "count":
        return (1.0 + s) / (10.0 + s)
    if kind == "annealing":
        return s / ((gamma or 100.0) + s)
    return decay * -math.expm1(-s / (gamma or 2000.0))


def _decay(
    decay: float | None, momentum: float | None, half_life: float | None, interval: int
) -> float:
    if sum(given is not None for given in (decay, momentum, half_life)) > 1:
        raise ValueError("decay, momentum and half_life say the same: give one of them")
    if momentum is not None:
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum={momentum}: a number in (0, 1], the weight of the newest")
        return 1.0 - momentum
    if half_life is not None:
        if not 0 < half_life < math.inf:
            raise ValueError(f"half_life={half_life}: a number of updates above 0")
        return float(0.5 ** (interval / half_life))
    decay = 0.999 if decay is None else decay
    if not 0 <= decay < 1:
        raise ValueError(f"decay={decay}: a number in [0, 1)")
    return decay
