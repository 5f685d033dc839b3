"""Power-function averages against sums of snapshots, reconstruction against averages kept."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from dgavg.averaging import PostHocMean, PowerMean
from dgavg.averaging.posthoc import power_of


def walk(updates, size=40, seed=0):
    """A random walk of weights as float32 vectors."""
    steps = np.random.default_rng(seed).normal(size=(updates, size))
    return torch.from_numpy(np.cumsum(steps, axis=0) + 5).float()


def taken(average, weights):
    for w in weights:
        average.update({"w": w})
    return average


def shares(power, n):
    """The weight of each of n updates: the profile integrated over that update."""
    edges = np.linspace(0, 1, n + 1) ** (power + 1)
    return np.diff(edges)


@pytest.mark.parametrize("length", [0.02, 0.05, 0.1, 0.2, 0.28])
def test_a_length_is_the_deviation_of_the_weights_in_time(length):
    n = 20_000
    time = (np.arange(n) + 0.5) / n
    weight = shares(power_of(length), n)
    mean = (weight * time).sum()
    assert math.sqrt((weight * (time - mean) ** 2).sum()) == pytest.approx(length, rel=1e-3)


def test_the_longest_is_the_uniform_mean():
    assert power_of(1 / math.sqrt(12)) == pytest.approx(0, abs=1e-6)
    assert power_of(0.2887) == 0  # as messages and papers write it


@pytest.mark.parametrize("length", [0.0, -0.1, 0.28871, 0.3, math.nan])
def test_a_length_out_of_range_is_refused(length):
    with pytest.raises(ValueError, match=rf"length={length}: a share of training in \(0, 0.2887\]"):
        PowerMean({"w": torch.zeros(1)}, length=length)


@pytest.mark.parametrize("length", [0.05, 0.1, 0.25])
def test_an_average_is_the_profile_over_all_snapshots(length):
    weights = walk(300)
    found = taken(PowerMean({"w": weights[0]}, length=length), weights).weights()["w"]
    expected = shares(power_of(length), 300) @ weights.double().numpy()
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)


def test_an_interval_leaves_the_length_as_it_is():
    """ema-pytorch's KarrasEMA with its default interval averages the first 7 % of training."""
    weights = walk(3000)
    every = taken(PowerMean({"w": weights[0]}, length=0.1, interval=10), weights).weights()["w"]
    expected = shares(power_of(0.1), 300) @ weights[::10].double().numpy()
    np.testing.assert_allclose(every.numpy(), expected, rtol=1e-4)


def test_coefficients_fit_the_profiles_by_least_squares():
    """Against profiles on a grid: the same fit by NumPy, divided by its sum."""
    post = taken(PostHocMean({"w": torch.zeros(40)}, snapshot_every=100), walk(350))
    grid = (np.arange(200_000) + 0.5) / 200_000 * 350
    columns = [
        np.where(grid < n, (g + 1) / n * (grid / n) ** g, 0.0)
        for n in (100, 200, 300, 350)
        for g in (power_of(0.05), power_of(0.1))
    ]
    g = power_of(0.15)
    target = np.where(grid < 350, (g + 1) / 350 * (grid / 350) ** g, 0.0)
    expected = np.linalg.lstsq(np.stack(columns, axis=1), target, rcond=None)[0]
    found = post.coefficients(0.15)
    assert sum(found) == pytest.approx(1)
    np.testing.assert_allclose(found, expected / expected.sum(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("length", [0.05, 0.1])
def test_a_length_that_was_kept_is_given_back(length):
    weights = walk(250)
    post = taken(PostHocMean({"w": weights[0]}, snapshot_every=100), weights)
    kept = taken(PowerMean({"w": weights[0]}, length=length), weights)
    torch.testing.assert_close(post.weights(length)["w"], kept.weights()["w"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("length", "error"), [(0.07, 0.01), (0.15, 0.02), (0.25, 0.05)])
def test_other_lengths_come_close_to_averages_kept_while_training(length, error):
    weights = walk(1600)
    post = taken(PostHocMean({"w": weights[0]}, snapshot_every=100), weights)
    kept = taken(PowerMean({"w": weights[0]}, length=length), weights).weights()["w"]
    gap = (post.weights(length)["w"] - kept).norm() / (weights[-1] - kept).norm()
    assert gap < error


def test_an_earlier_update_is_reconstructed_too():
    weights = walk(1600)
    post = taken(PostHocMean({"w": weights[0]}, snapshot_every=100), weights)
    kept = taken(PowerMean({"w": weights[0]}, length=0.1), weights[:850]).weights()["w"]
    gap = (post.weights(0.1, at=850)["w"] - kept).norm() / (weights[-1] - kept).norm()
    assert gap < 0.02
    for at in (0, 1601, 2.5):
        with pytest.raises(ValueError, match=f"at={at}: an update from 1 to 1600"):
            post.weights(0.1, at=at)


def test_snapshots_are_copies_and_the_newest_averages_count_without_one():
    model = nn.Linear(2, 2)
    post = PostHocMean(model, snapshot_every=2)
    for value in (1.0, 2.0, 3.0):
        nn.init.constant_(model.weight, value)
        post.update(model)
    assert [s["count"] for s in post.snapshots] == [2, 2]
    assert len(post.coefficients(0.1)) == 4
    kept = PowerMean(model, length=0.1)
    for value in (1.0, 2.0, 3.0):
        nn.init.constant_(model.weight, value)
        kept.update(model)
    torch.testing.assert_close(post.weights(0.1)["weight"], kept.weights()["weight"])


def test_large_values_and_counters_survive_storage_in_few_bits():
    """float16 would make 70001 infinite."""
    model = nn.BatchNorm1d(2)
    model.num_batches_tracked.fill_(70001)
    with torch.no_grad():
        model.running_var.fill_(1e5)
    post = PostHocMean(model, snapshot_every=1, dtype=torch.bfloat16, buffers="average")
    for _ in range(3):
        post.update(model)
    found = post.weights(0.1)
    assert found["num_batches_tracked"].item() == 70001
    assert found["running_var"].tolist() == pytest.approx([1e5, 1e5], rel=0.01)
    model.load_state_dict(found)


def test_start_is_where_counting_begins():
    weights = walk(300)
    late = taken(PostHocMean({"w": weights[0]}, snapshot_every=50, start=100), weights)
    straight = taken(PostHocMean({"w": weights[0]}, snapshot_every=50), weights[100:])
    assert late.count == 200
    assert torch.equal(late.weights(0.2)["w"], straight.weights(0.2)["w"])


def test_it_goes_on_from_its_saved_state_to_the_bit():
    weights = walk(300)
    straight = taken(PostHocMean({"w": weights[0]}, snapshot_every=40), weights[:130])
    resumed = PostHocMean({"w": weights[0]}, snapshot_every=40)
    resumed.load_state_dict(straight.state_dict())
    for average in (straight, resumed):
        taken(average, weights[130:])
    assert len(straight.snapshots) == len(resumed.snapshots) == 14
    assert torch.equal(straight.weights(0.2)["w"], resumed.weights(0.2)["w"])


def test_other_lengths_or_models_in_a_state_are_refused():
    state = taken(
        PostHocMean({"w": torch.zeros(2)}, snapshot_every=1), torch.ones(3, 2)
    ).state_dict()
    with pytest.raises(ValueError, match="the state has 2 averages, not 1"):
        PostHocMean({"w": torch.zeros(2)}, lengths=[0.1]).load_state_dict(state)
    with pytest.raises(ValueError, match=r"w is \(2,\), the average \(3,\)"):
        PostHocMean({"w": torch.zeros(3)}).load_state_dict(state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lengths": []}, r"lengths=\[\]: at least one"),
        ({"lengths": [0.1, 0.1]}, r"lengths=\[0.1, 0.1\]: at least one, all different"),
        ({"snapshot_every": 0}, "snapshot_every=0: a number of updates from 1 on"),
        ({"snapshot_every": 1.5}, r"snapshot_every=1\.5: a number of updates from 1 on"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PostHocMean({"w": torch.zeros(1)}, **settings)


def test_before_the_first_update_there_is_nothing_to_give():
    with pytest.raises(ValueError, match="no weights have been averaged yet"):
        PostHocMean({"w": torch.zeros(1)}).weights(0.1)


def test_snapshots_outlive_a_change_of_the_order_in_memory():
    model = nn.Conv2d(2, 3, 2)
    post, kept = PostHocMean(model, snapshot_every=2), PowerMean(model, length=0.1)
    values = torch.randn(5, *model.weight.shape, generator=torch.Generator().manual_seed(0))
    for i, value in enumerate(values):
        if i == 3:
            model.to(memory_format=torch.channels_last)
        model.weight.data.copy_(value)
        post.update(model)
        kept.update(model)
    torch.testing.assert_close(post.weights(0.1)["weight"], kept.weights()["weight"])
    assert len(post.snapshots) == 4
    exact = post.coefficients(0.1, at=2)
    assert max(exact) == pytest.approx(1, abs=1e-6)
    fresh = PowerMean(model, length=0.1)
    for value in values[:2]:
        model.weight.data.copy_(value)
        fresh.update(model)
    found = post.weights(0.1, at=2)["weight"]
    torch.testing.assert_close(found, fresh.weights()["weight"], rtol=1e-4, atol=1e-4)
