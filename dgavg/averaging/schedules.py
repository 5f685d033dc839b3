"""Learning rates that go with weight averages, as pure functions of the step.

`t` is the 0-based step of the run and the result the rate of that step, so whoever counts epochs
passes `epoch * steps_per_epoch + batch`, and gets a rate that is constant within an epoch by
passing the epoch's first step. `start` is the step at which averaging begins.
"""

from __future__ import annotations

import math

SHAPES = ("cosine", "linear")


def swa_lr(
    t: float, start: float, initial: float, final: float, *, total: float | None = None
) -> float:
    """SWA's learning rate at step `t`: `initial`, eased linearly to `final`, then flat.

    With s = t/start the rate is `initial` up to s = 0.5, falls linearly to `final` at s = 0.9, and
    stays there: the schedule of Izmailov et al. 2018 (arXiv 1803.05407) in their code, and the
    `constant` one of keras-swa, whose `start_epoch` counts from 1: start is that less one. A start
    of 0 gives `final` throughout.

    >>> [round(swa_lr(t, start=100, initial=0.1, final=0.05), 4) for t in (0, 50, 70, 90, 200)]
    [0.1, 0.1, 0.075, 0.05, 0.05]

    With `total` s is t/total, the share of the whole run, and the ramp is in force from `start`
    on: before it the rate is `initial`. So it jumps at a start later than total/2, and ends at
    `final` only if averaging goes on after 0.9 of the run. This is dicee's schedule.

    >>> [round(swa_lr(t, 75, 0.1, 0.05, total=100), 5) for t in (0, 74, 75, 89, 90, 99)]
    [0.1, 0.1, 0.06875, 0.05125, 0.05, 0.05]

    Raises `ValueError` for a `total` that is not positive.
    """
    if total is None:
        return initial + (final - initial) * (_ramp(t / start) if start > 0 else 1.0)
    if total <= 0:
        raise ValueError(f"total={total}: the steps of the whole run, more than 0")
    return initial + (final - initial) * (_ramp(t / total) if t >= start else 0.0)


def annealed_lr(
    t: float, start: float, length: float, initial: float, final: float, shape: str = "cosine"
) -> float:
    """`initial` up to step `start`, then eased to `final` within `length` steps, then flat.

    With s = (t − start)/length the share of `final` is s (`shape="linear"`) or (1 − cos πs)/2
    (`"cosine"`). This is the closed form of `torch.optim.swa_utils.SWALR` with
    `anneal_epochs=length` whose constructor sets the rate of `start`: after its k-th `step()` the
    rate is that of t = start + k. A length of 0 jumps to `final` at `start`, as there.

    >>> [round(annealed_lr(t, 10, 4, 0.1, 0.05), 4) for t in (0, 10, 11, 12, 13, 14, 99)]
    [0.1, 0.1, 0.0927, 0.075, 0.0573, 0.05, 0.05]
    >>> [round(annealed_lr(t, 10, 4, 0.1, 0.05, "linear"), 4) for t in (10, 11, 12, 13, 14)]
    [0.1, 0.0875, 0.075, 0.0625, 0.05]

    Raises `ValueError` for a negative length or another shape.
    """
    if length < 0:
        raise ValueError(f"length={length}: steps from {initial} to {final}, at least 0")
    if shape not in SHAPES:
        raise ValueError(f"shape={shape!r}: choose cosine or linear")
    s = min(max((t - start) / length, 0.0), 1.0) if length > 0 else float(t >= start)
    share = s if shape == "linear" else (1.0 - math.cos(math.pi * s)) / 2.0
    return initial + (final - initial) * share


def cyclic_lr(
    t: float,
    start: float,
    period: float,
    initial: float,
    low: float | None = None,
    high: float | None = None,
) -> float:
    """A sawtooth from `start` on, `period` steps a tooth; before it, the ramp of `swa_lr` to `low`.

    With i = (t − start) mod period + 1 the rate is high + (low − high)·i/period: the first step of
    a tooth is one part below `high`, its last step, after which a model is taken in, exactly `low`.
    This is keras-swa's `cyclic` with start = (start_epoch − 1)·steps_per_epoch and
    period = swa_freq·steps_per_epoch; before the start it sets the rate once an epoch, to the ramp
    at the epoch's first step. Left out, `low` is 0.1·initial and `high` is low + (initial − low)/4:
    its `auto`.

    >>> [round(cyclic_lr(t, 10, 4, initial=0.1), 6) for t in (0, 9, 10, 11, 12, 13, 14)]
    [0.1, 0.01, 0.026875, 0.02125, 0.015625, 0.01, 0.026875]

    Raises `ValueError` for a period below 1 or a `low` above `high`.
    """
    low = 0.1 * initial if low is None else low
    high = low + 0.25 * (initial - low) if high is None else high
    _check_cycle(period, low, high)
    if t < start:
        return swa_lr(t, start, initial, low)
    share = ((t - start) % period + 1) / period
    return (1.0 - share) * high + share * low


def fge_lr(t: float, start: float, period: float, high: float, low: float) -> float:
    """A triangle from `start` on, from `high` to `low` and back in `period` steps; before it, high.

    With s = (t − start) mod period, as a share of the period, the rate falls linearly from `high`
    at s = 0 to `low` at s = 1/2 and rises again: Fast Geometric Ensembling (Garipov et al. 2018,
    arXiv 1802.10026), which takes in a model half way through each period. In its code start is the
    epoch at which the cycles begin and period the `cycle`, times the steps of an epoch.

    >>> [round(fge_lr(t, 10, 8, high=0.05, low=0.01), 3) for t in (0, 10, 12, 14, 16, 18)]
    [0.05, 0.05, 0.03, 0.01, 0.03, 0.05]

    Raises `ValueError` for a period below 1 or a `low` above `high`.
    """
    _check_cycle(period, low, high)
    share = (t - start) % period / period if t >= start else 0.0
    return high + (low - high) * (1.0 - abs(1.0 - 2.0 * share))


def _ramp(s: float) -> float:
    """0 up to s = 0.5, 1 from s = 0.9 on, linear between."""
    return min(max((s - 0.5) / 0.4, 0.0), 1.0)


def _check_cycle(period: float, low: float, high: float) -> None:
    if period < 1:
        raise ValueError(f"period={period}: the steps of a cycle, at least 1")
    if low > high:
        raise ValueError(f"low={low}, high={high}: low is the smaller rate")
