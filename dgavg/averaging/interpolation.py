"""The straight line between two models: WiSE-FT, and the loss barrier along the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from dgavg.averaging.mixture import Mixture, Source, tensors_of


def interpolate(start: Source, end: Source, alpha: float) -> dict[str, Tensor]:
    """(1 − α)·start + α·end, by name.

    WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903), where `start` is the pre-trained and `end` the
    fine-tuned model; an α outside [0, 1] extrapolates. Floating and complex tensors are mixed in at
    least float32 and come back in the dtypes of `start`, tied ones tied; integers and booleans are
    those of the nearer end, so that 0 and 1 give the ends to the bit. Running statistics of batch
    norm are interpolated as any tensor: recalibrate them.

    Memory: the result, and one model where the two are functions that load them.

    Raises `ValueError` for models with different names or shapes, and an α that is not finite.
    """
    if not math.isfinite(alpha):
        raise ValueError(f"alpha={alpha}: a number, 0 for start and 1 for end")
    mixture = Mixture(tensors_of(start, "start"), "start")
    mixture.add(tensors_of(end, "end"), float(alpha), "end", integers=alpha >= 0.5)
    return mixture.weights()


@dataclass(frozen=True)
class LossBarrier:
    """The loss along the line between two models, and its height over the ends."""

    alphas: tuple[float, ...]
    losses: tuple[float, ...]
    height: float


def loss_barrier(
    start: Source,
    end: Source,
    loss: Callable[[dict[str, Tensor]], float],
    points: int | Sequence[float] = 11,
) -> LossBarrier:
    """How much the loss rises on the way from `start` to `end`: their linear connectivity.

    The height is the largest L(α) − [(1 − α)·L(0) + α·L(1)], as Entezari et al. 2022 (arXiv
    2110.06296) define it; Frankle et al. 2020 (arXiv 1912.05671) subtract the mean of the two ends
    instead. Near 0: the two lie in one basin, and averaging them is safe. NaN where a loss is.

    `loss(weights)` is the caller's, its batch norm too: statistics want recalibrating at each
    point, or the barrier is theirs. `points` is how many values of α from 0 to 1, or the values;
    the ends always are among them. Memory: the two models and the one between them.

    Raises `ValueError` as `interpolate` does, and for fewer than 2 points or values outside [0, 1].
    """
    if isinstance(points, int):
        if points < 2:
            raise ValueError(f"points={points}: at least 2, the ends")
        points = [i / (points - 1) for i in range(points)]
    if not all(0 <= alpha <= 1 for alpha in points):
        raise ValueError(f"points={list(points)}: values of alpha from 0 to 1")
    alphas = tuple(sorted({0.0, 1.0, *map(float, points)}))
    ends = tensors_of(start, "start"), tensors_of(end, "end")
    losses = tuple(float(loss(interpolate(*ends, alpha))) for alpha in alphas)
    rises = [
        value - ((1 - alpha) * losses[0] + alpha * losses[-1])
        for alpha, value in zip(alphas, losses, strict=True)
    ]
    height = math.nan if any(map(math.isnan, rises)) else max(rises)
    return LossBarrier(alphas, losses, height)
