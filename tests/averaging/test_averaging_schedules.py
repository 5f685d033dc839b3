"""swa_lr against the reference code of SWA."""

from __future__ import annotations

import pytest

from dgavg.averaging import swa_lr


def reference(epoch, lr_init, swa_lr, swa_start):
    """`schedule` of timgaripov/swa train.py."""
    t = epoch / swa_start
    ratio = swa_lr / lr_init
    if t <= 0.5:
        factor = 1.0
    elif t <= 0.9:
        factor = 1.0 - (1.0 - ratio) * (t - 0.5) / 0.4
    else:
        factor = ratio
    return lr_init * factor


@pytest.mark.parametrize(("initial", "final", "start"), [(0.1, 0.05, 161), (1e-3, 2e-3, 7)])
def test_the_rate_is_that_of_the_reference(initial, final, start):
    for t in range(2 * start):
        expected = reference(t, initial, final, start)
        assert swa_lr(t, start, initial, final) == pytest.approx(expected, rel=1e-12)


def test_a_start_of_0_means_the_final_rate_throughout():
    assert [swa_lr(t, 0, 0.1, 0.05) for t in (0, 1, 9)] == [0.05] * 3
