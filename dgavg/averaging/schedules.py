"""Learning rates that go with weight averages, as pure functions of the step."""

from __future__ import annotations


def swa_lr(t: float, start: float, initial: float, final: float) -> float:
    """SWA's learning rate at step `t`: `initial`, eased linearly to `final`, then flat.

    With s = t/start the rate is `initial` up to s = 0.5, falls linearly to `final` at s = 0.9, and
    stays there: the schedule of Izmailov et al. 2018 (arXiv 1803.05407) in their code.

    >>> [round(swa_lr(t, start=100, initial=0.1, final=0.05), 4) for t in (0, 50, 70, 90, 200)]
    [0.1, 0.1, 0.075, 0.05, 0.05]
    """
    share = min(max((t / start - 0.5) / 0.4, 0.0), 1.0) if start > 0 else 1.0
    return initial + (final - initial) * share
