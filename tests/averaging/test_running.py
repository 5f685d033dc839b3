"""RunningMean against the mean of stored snapshots; start and interval; blending averages."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from trajectories import assert_same, small_net, walk, wander

from dgavg.averaging import ExponentialMean, RunningMean


def test_two_thousand_updates_equal_the_mean_of_all_snapshots():
    random = np.random.default_rng(0)
    snapshots = random.normal(1.0, 0.3, size=(2000, 50)).astype(np.float32)
    live = {"w": torch.zeros(50)}
    average = RunningMean(live)
    for snapshot in snapshots:
        live["w"].copy_(torch.from_numpy(snapshot))
        average.update(live)
    exact = snapshots.astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(average.weights()["w"].numpy(), exact, rtol=1e-5)


@pytest.mark.parametrize(
    ("first_count", "shares"),
    [(1, [0.25] * 4), (2, [0.4, 0.2, 0.2, 0.2]), (3, [3 / 6, *[1 / 6] * 3])],
)
def test_the_first_snapshot_counts_as_often_as_asked(first_count, shares):
    live = {"w": torch.zeros(4)}
    average = RunningMean(live, first_count=first_count)
    for row in torch.eye(4):
        live["w"].copy_(row)
        average.update(live)
    assert average.weights()["w"].tolist() == pytest.approx(shares)


@pytest.mark.parametrize("first_count", [0, math.nan, math.inf])
def test_a_first_count_that_is_no_number_of_models_is_refused(first_count):
    with pytest.raises(ValueError, match=f"first_count={first_count}: at least 1"):
        RunningMean({"w": torch.zeros(1)}, first_count=first_count)


@pytest.mark.parametrize(("start", "interval"), [(0, 1), (0, 4), (3, 1), (5, 3), (5.0, 3.0)])
def test_start_and_interval_choose_which_updates_count(start, interval):
    live = {"w": torch.zeros(1), "n": torch.tensor(0)}
    average = RunningMean(live, start=start, interval=interval)
    for value in range(20):
        live["w"].fill_(value)
        live["n"].fill_(value)
        average.update(live)
    chosen = range(int(start), 20, int(interval))
    assert average.weights()["w"].item() == pytest.approx(np.mean(chosen))
    assert average.weights()["n"].item() == chosen[-1]
    assert (average.calls, average.count) == (20, len(chosen))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": -1}, "start=-1: a number of updates from 0 on"),
        ({"start": 1.5}, "start=1.5: a number of updates from 0 on"),
        ({"start": math.inf}, "start=inf: a number of updates from 0 on"),
        ({"start": math.nan}, "start=nan: a number of updates from 0 on"),
        ({"interval": 0}, "interval=0: a number of updates from 1 on"),
        ({"interval": 2.5}, "interval=2.5: a number of updates from 1 on"),
        ({"interval": math.inf}, "interval=inf: a number of updates from 1 on"),
    ],
)
def test_starts_and_intervals_that_are_no_numbers_of_updates_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RunningMean({"w": torch.zeros(1)}, **options)


def averaged(updates, seed=0, **options):
    model = small_net(seed)
    average = RunningMean(model, **options)
    for _ in walk(model, updates):
        average.update(model)
    return average, model


@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
def test_blending_moves_towards_another_average(rate):
    first, _ = averaged(3)
    second, model = averaged(5, seed=1)
    expected = {
        name: (1 - rate) * tensor + rate * second.weights()[name]
        for name, tensor in first.weights().items()
    }
    expected |= {name: second.weights()[name].clone() for name, _ in model.named_buffers()}
    first.blend(second, rate)
    assert_same(first.weights(), expected)
    assert (first.calls, first.count) == (4, 4)


def test_blending_into_nothing_copies():
    other, model = averaged(3)
    average = RunningMean(model)
    average.blend(other, 0.1)
    assert_same(average.weights(), other.weights(), rtol=0)
    wander(model, 7)
    other.update(model)  # no memory in common
    assert not average.weights()["0.weight"].equal(other.weights()["0.weight"])


def test_blending_averages_of_other_precision():
    average, other = (
        ExponentialMean({"w": torch.full((3,), v, dtype=d)})
        for v, d in ((1.0, torch.float32), (2.0, torch.float64))
    )
    for a in (average, other):
        a.update({"w": torch.full((3,), 1.0 if a is average else 2.0, dtype=torch.float64)})
    average.blend(other, 0.5)
    assert average.weights()["w"].tolist() == [1.5] * 3


def test_blending_what_does_not_fit_is_refused():
    average, model = averaged(2)
    with pytest.raises(ValueError, match="no weights have been averaged yet"):
        average.blend(RunningMean(model), 0.5)
    with pytest.raises(ValueError, match=r"rate=1\.5: a number from 0 to 1"):
        average.blend(average, 1.5)
    with pytest.raises(ValueError, match="give both the same buffers"):
        average.blend(averaged(2, buffers="average")[0], 0.5)
    other = RunningMean(nn.Linear(1, 1))
    other.update(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="another model"):
        average.blend(other, 0.5)
    narrow = RunningMean({"weight": torch.zeros(1, 1), "bias": torch.zeros(3)})
    narrow.update({"weight": torch.zeros(1, 1), "bias": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"bias is \(3,\), the average \(1,\)"):
        other.blend(narrow, 0.5)
    assert (average.calls, average.count) == (2, 2)


def test_restarting_forgets():
    average, model = averaged(3)
    average.restart()
    assert (average.calls, average.count) == (0, 0)
    with pytest.raises(ValueError, match="no weights have been averaged yet"):
        average.weights()
    wander(model, 9)
    average.update(model)
    assert_same(average.weights(), dict(model.state_dict()), rtol=0)
