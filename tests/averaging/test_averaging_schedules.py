"""Learning rates against the definitions they come from, and torch's own scheduler."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch.optim.swa_utils import SWALR

from dgavg.averaging.schedules import annealed_lr, cyclic_lr, fge_lr, swa_lr


def ramp(t, initial, final):
    """The piecewise definition that SWA's code, dicee and keras-swa share."""
    if t <= 0.5:
        return initial
    if t <= 0.9:
        return initial * (1.0 - (1.0 - final / initial) * (t - 0.5) / 0.4)
    return final


@pytest.mark.parametrize(("initial", "final", "start"), [(0.1, 0.05, 161), (1e-3, 2e-3, 7)])
def test_the_rate_is_that_of_the_reference(initial, final, start):
    for t in range(2 * start):
        expected = ramp(t / start, initial, final)
        assert swa_lr(t, start, initial, final) == pytest.approx(expected, rel=1e-12)


def test_a_start_of_0_means_the_final_rate_throughout():
    assert [swa_lr(t, 0, 0.1, 0.05) for t in (0, 1, 9)] == [0.05] * 3


@pytest.mark.parametrize("start", [0, 30, 75, 95, 200])
def test_over_the_whole_run_the_ramp_is_in_force_from_the_start_on(start):
    """dicee's: untouched before the start epoch, then t = epoch/max_epochs."""
    for epoch in range(100):
        expected = ramp(epoch / 100, 0.1, 0.05) if epoch >= start else 0.1
        assert swa_lr(epoch, start, 0.1, 0.05, total=100) == pytest.approx(expected, rel=1e-12)


def test_a_late_start_jumps_into_the_ramp():
    assert swa_lr(75, 75, 0.1, 0.05, total=100) == pytest.approx(0.06875)  # flat 0.05 in SWA's
    assert swa_lr(75, 75, 0.1, 0.05) == pytest.approx(0.05)


@pytest.mark.parametrize("length", [0, 1, 4, 10])
@pytest.mark.parametrize("shape", ["cosine", "linear"])
@pytest.mark.parametrize("rates", [(0.1, 0.05), (0.01, 0.2)])
def test_annealing_is_torch_s_stepped(rates, shape, length):
    initial, final = rates
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=initial)
    strategy = {"cosine": "cos", "linear": "linear"}[shape]
    scheduler = SWALR(optimizer, final, anneal_epochs=length, anneal_strategy=strategy)
    for k in range(2 * length + 3):
        expected = optimizer.param_groups[0]["lr"]
        found = annealed_lr(50 + k, 50, length, initial, final, shape)
        assert found == pytest.approx(expected, rel=1e-9)
        with warnings.catch_warnings(action="ignore"):  # no optimizer step between
            scheduler.step()


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_annealing_waits_for_its_start(shape):
    assert [annealed_lr(t, 50, 4, 0.1, 0.05, shape) for t in (0, 49, 50)] == [0.1] * 3
    assert [annealed_lr(t, 50, 0, 0.1, 0.05, shape) for t in (49, 50)] == [0.1, 0.05]


def test_annealing_is_by_cosine_unless_told():
    expected = 0.1 + (0.05 - 0.1) * (1 - math.cos(math.pi / 4)) / 2
    assert annealed_lr(1, 0, 4, 0.1, 0.05) == pytest.approx(expected, rel=1e-12)


def keras_cyclic(epoch, batch, start_epoch, freq, steps, initial, low=None, high=None):
    """keras-swa's cyclic schedule, by 0-based epoch and batch, with its automatic rates."""
    start = start_epoch - 1
    low = 0.1 * initial if low is None else low
    high = low + (initial - low) * 0.25 if high is None else high
    if epoch < start:
        return ramp(epoch / start, initial, low)
    cycle = freq * steps
    i = ((epoch - start) % freq) * steps + (batch + 1)
    t = (((i - 1) % cycle) + 1) / cycle
    return (1 - t) * high + t * low


@pytest.mark.parametrize("rates", [{}, {"low": 0.02}, {"low": 0.001, "high": 0.3}])
@pytest.mark.parametrize(("start_epoch", "freq", "steps"), [(11, 3, 7), (2, 2, 1), (5, 1, 4)])
def test_the_cycle_is_that_of_keras_swa(start_epoch, freq, steps, rates):
    start = (start_epoch - 1) * steps
    for epoch in range(start_epoch + 3 * freq):
        for batch in range(steps):
            first = epoch * steps
            t = first if epoch < start_epoch - 1 else first + batch  # once an epoch before
            expected = keras_cyclic(epoch, batch, start_epoch, freq, steps, 0.1, **rates)
            found = cyclic_lr(t, start, freq * steps, 0.1, **rates)
            assert found == pytest.approx(expected, rel=1e-12)


def test_each_tooth_ends_exactly_at_its_low():
    assert [cyclic_lr(t, 6, 3, 0.1, low=0.01, high=0.07) for t in (8, 11, 14)] == [0.01] * 3


@pytest.mark.parametrize(("cycle", "steps"), [(4, 5), (2, 1), (3, 2), (1, 6)])
def test_the_triangle_is_that_of_fge(cycle, steps):
    """By epoch and fraction of it, as its code counts."""
    high, low, first = 0.05, 0.0005, 6
    for epoch in range(3 * cycle):
        for i in range(steps):
            t = ((epoch % cycle) + i / steps) / cycle
            down, up = high * (1 - 2 * t) + low * 2 * t, high * (2 * t - 1) + low * (2 - 2 * t)
            found = fge_lr((first + epoch) * steps + i, first * steps, cycle * steps, high, low)
            assert found == pytest.approx(down if t < 0.5 else up, rel=1e-12)


def test_the_triangle_waits_at_its_high():
    assert [fge_lr(t, 10, 4, 0.05, 0.01) for t in (0, 7, 9, 10)] == [0.05] * 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: swa_lr(3, 1, 0.1, 0.05, total=0), r"^total=0: the steps of the whole run"),
        (lambda: annealed_lr(3, 1, -1, 0.1, 0.05), r"^length=-1: steps from 0.1 to 0.05, at lea"),
        (lambda: annealed_lr(3, 1, 2, 0.1, 0.05, "cos"), r"^shape='cos': choose cosine or linear$"),
        (lambda: cyclic_lr(3, 1, 0, 0.1), r"^period=0: the steps of a cycle, at least 1$"),
        (lambda: cyclic_lr(3, 1, 2, 0.1, 0.2, 0.1), r"^low=0.2, high=0.1: low is the smaller rate"),
        (lambda: fge_lr(0, 1, 0.5, 0.1, 0.01), r"^period=0.5: the steps of a cycle, at least 1$"),
        (lambda: fge_lr(0, 1, 2, 0.1, 0.2), r"^low=0.2, high=0.1: low is the smaller rate$"),
    ],
)
def test_arguments_that_make_no_schedule_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
