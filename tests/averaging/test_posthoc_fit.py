"""What snapshots can make of a length at an update, what they can not, written into a model."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from trajectories import assert_same, snapshot, wander

from dgavg.averaging import ExponentialMean, PostHocMean, PowerMean
from dgavg.averaging.posthoc import MISFIT, _fit, fit, power_of


@pytest.fixture(scope="module")
def post():
    """After a random walk of 400 updates, with a snapshot every 50; and the walk."""
    steps = np.random.default_rng(0).normal(size=(400, 40))
    weights = torch.from_numpy(np.cumsum(steps, axis=0) + 5)
    average = PostHocMean({"w": weights[0]}, snapshot_every=50)
    for w in weights:
        average.update({"w": w})
    return average, weights


def profile(n, length, grid):
    """The weights in time of the average of n updates, as density on a grid of 400."""
    g = power_of(length)
    return np.where(grid < n, (g + 1) / n * (grid / n) ** g, 0.0)


@pytest.mark.parametrize(("length", "at"), [(0.1, 25), (0.05, 399), (0.2, 110), (0.1, 400)])
def test_the_misfit_is_what_the_fit_leaves_of_the_profile(length, at):
    grid = (np.arange(400_000) + 0.5) / 1000
    kept = [(n, k) for n in range(50, 401, 50) for k in (0.05, 0.1)]
    shares, missed = fit([(n, power_of(k)) for n, k in kept], (at, power_of(length)))
    target = profile(at, length, grid)
    left = target - sum(c * profile(n, k, grid) for c, (n, k) in zip(shares, kept, strict=True))
    assert missed == pytest.approx((left**2).sum() / (target**2).sum(), rel=1e-3, abs=1e-6)


def test_what_is_given_is_near_and_the_rest_is_refused(post):
    """A bad fit missed the average by its whole distance from the start, without a word."""
    average, weights = post
    given, refused = 0, 0
    for at in range(1, 401, 6):
        for length in (0.05, 0.1, 0.2):
            edges = np.linspace(0, 1, at + 1) ** (power_of(length) + 1)
            exact = torch.from_numpy(np.diff(edges)) @ weights[:at]
            try:
                found = average.weights(length, at)["w"]
            except ValueError:
                refused += 1
                assert not average.can_make(length, at)
                continue
            given += 1
            assert average.can_make(length, at)
            assert (found - exact).norm() < 0.25 * (exact - weights[0]).norm()
    assert given > 70
    assert refused > 30


@pytest.mark.parametrize(
    ("length", "at", "message"),
    [
        (0.1, 5, "length=0.1, at=5: the snapshots miss 111% of it; choose at=50, the nearest"),
        (0.1, 75, "at=75: the snapshots miss 121% of it; choose at=50 or 100, the nearest"),
        (0.005, None, "at=400: the snapshots miss 54% of it; choose a length nearer to 0.05, 0.1"),
        (0.25, 50, "at=50: the snapshots miss 108% of it; choose a length nearer to 0.05, 0.1"),
    ],
)
def test_what_the_snapshots_do_not_hold_is_refused(post, length, at, message):
    average, _ = post
    for use in (average.weights, average.coefficients):
        with pytest.raises(ValueError, match=message):
            use(length, at)
    with pytest.raises(ValueError, match=message):
        average.copy_to({"w": torch.zeros(40)}, length, at)
    target = nn.ParameterDict({"w": torch.zeros(40)})
    with pytest.raises(ValueError, match=message), average.applied_to(target, length, at):
        pass


@pytest.mark.parametrize("length", [0.01, 0.015, 0.05, 0.1, 0.15, 0.2, 0.25, 0.28, 0.2887])
@pytest.mark.parametrize("snapshots", [16, 256])
def test_lengths_that_the_paper_scans_can_be_made(length, snapshots):
    """EDM2 keeps 0.05 and 0.1 and looks at lengths from 0.01 to 0.25, of up to 256 snapshots."""
    counts = [1000 * (i + 1) for i in range(snapshots)]
    kept = [(n, power_of(k)) for n in counts for k in (0.05, 0.1)]
    _, missed = fit(kept, (counts[-1], power_of(length)))
    assert missed < MISFIT / 2


def net():
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


def wandered(updates=20):
    model = net()
    average = PostHocMean(model, snapshot_every=5)
    for step in range(updates):
        wander(model, step)
        average.update(model)
    return average, model


@pytest.mark.parametrize("at", [None, 10])
def test_it_is_written_into_a_model(at):
    average, model = wandered()
    expected, before = average.weights(0.1, at), snapshot(model)
    target = net()
    average.copy_to(target, 0.1, at)
    assert_same(target.state_dict(), expected, rtol=0)
    with average.applied_to(model, 0.1, at):
        assert_same(model.state_dict(), expected, rtol=0)
        model[0].weight.data.fill_(9)
    assert_same(snapshot(model), before, rtol=0)
    assert_same(average.weights(0.1, at), expected, rtol=0)


def test_before_the_first_update_the_model_stays_as_it_is():
    model = net()
    average, before = PostHocMean(model), snapshot(model)
    with average.applied_to(model, 0.1):
        assert_same(snapshot(model), before, rtol=0)
    with pytest.raises(ValueError, match="no weights have been averaged yet"):
        average.copy_to(model, 0.1)


def test_it_starts_again():
    average, model = wandered()
    average.restart()
    assert (average.calls, average.count, average.snapshots) == (0, 0, [])
    kept = PowerMean(model, length=0.1)
    for step in range(6):
        wander(model, step)
        average.update(model)
        kept.update(model)
    assert_same(average.weights(0.1), kept.weights(), rtol=1e-4)


def test_calls_are_counted_and_those_that_count():
    model = net()
    average = PostHocMean(model, start=2, interval=3)
    for _ in range(7):
        average.update(model)
    assert (average.calls, average.count) == (7, 2)


def test_attached_it_takes_in_steps_but_not_those_that_a_scaler_skips():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    average, plain = PostHocMean(model, snapshot_every=2), ExponentialMean(model)
    handle = average.attach(optimizer, model)
    plain.attach(optimizer, model)
    for factor in (1.0, torch.inf, 1.0, 1.0):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(1, 2)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    assert average.count == plain.count == 3
    assert [s["count"] for s in average.snapshots] == [2, 2]
    handle.remove()
    optimizer.step()
    assert (average.count, plain.count) == (3, 4)


def test_two_averages_alone_make_the_length_0_2(post):
    """What the link offers by default, from its first step on."""
    average, _ = post
    assert average.can_make(0.2, 50)
    assert not average.can_make(0.25, 50)
    model = nn.Linear(2, 2)
    young = PostHocMean(model)
    for step in range(3):
        wander(model, step)
        young.update(model)
    assert young.weights(0.2).keys() == {"weight", "bias"}


def plain_sums(average, shares, model):
    """Each tensor by name: the shares of the snapshots and averages, added one after the other."""
    names = [k for k, v in model.state_dict().items() if v.is_floating_point()]
    found = {}
    for i, name in enumerate(names):
        found[name] = torch.zeros_like(average.averages[0].weights()[name])
        vectors = [average._layout.views(s["vector"])[i] for s in average.snapshots]
        if len(shares) > len(vectors):
            vectors += [a.weights()[name] for a in average.averages]
        for share, vector in zip(shares, vectors, strict=True):
            found[name].add_(vector.to(found[name].dtype), alpha=share)
    return found


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("updates", [20, 23])
@pytest.mark.parametrize("chunk", [1 << 16, 7])
def test_many_lengths_at_once_are_each_the_plain_sum_to_the_bit(chunk, updates, dtype, monkeypatch):
    monkeypatch.setattr("dgavg.averaging.posthoc.CHUNK", chunk)
    model = nn.Sequential(nn.Linear(3, 4), nn.Conv2d(2, 3, 2), nn.BatchNorm1d(2))
    model.to(memory_format=torch.channels_last)
    average = PostHocMean(model, snapshot_every=5, buffers="average", dtype=dtype)
    for step in range(updates):
        wander(model, step)
        average.update(model)
    assert {s["vector"].dtype for s in average.snapshots} == {dtype or torch.float32}
    lengths = [0.05, 0.2, 0.1]
    found = average.weights_of(lengths)
    for length, weights in zip(lengths, found, strict=True):
        exact = plain_sums(average, average.coefficients(length), model)
        assert_same({k: weights[k] for k in exact}, exact, rtol=0)
        assert_same(weights, average.weights(length), rtol=0)
        assert weights.keys() == model.state_dict().keys()
    assert all(a["0.bias"].data_ptr() != b["0.bias"].data_ptr() for a, b in pairwise(found))
    kept = [{k: v.clone() for k, v in w.items() if v.is_floating_point()} for w in found]
    wander(model, 99)
    average.update(model)
    for one, other in zip(found, kept, strict=True):
        assert_same({k: one[k] for k in other}, other, rtol=0)
    assert average.weights_of([]) == []


def test_many_lengths_are_refused_as_one_is(post):
    average, _ = post
    with pytest.raises(ValueError, match=r"length=0\.1, at=5: the snapshots miss 111%"):
        average.weights_of([0.1], 5)
    early = average.weights_of([0.1, 0.2], 100)
    assert_same(early[1], average.weights(0.2, 100), rtol=0)


def test_sums_keep_each_tensors_precision():
    model = nn.ParameterDict({"a": torch.zeros(3), "b": torch.zeros(4, dtype=torch.float64)})
    average = PostHocMean(model, snapshot_every=1)
    for value in (1.0, 1.0 + 1e-12):
        for p in model.parameters():
            nn.init.constant_(p, value)
        average.update(model)
    found = average.weights(0.1)
    assert (found["a"].dtype, found["b"].dtype) == (torch.float32, torch.float64)
    assert 1 < found["b"][0].item() < 1 + 2e-12


def test_the_fit_of_the_same_profiles_is_made_once_and_can_not_be_changed():
    profiles = [(5, 3.0), (10, 3.0)]
    first = fit(profiles, (10, 1.0))
    before = _fit.cache_info().hits
    fit(profiles, (10, 1.0))
    assert _fit.cache_info().hits == before + 1
    first[0][0] = 7.0
    assert fit(profiles, (10, 1.0))[0][0] != 7.0
    assert fit(profiles, (10, 1.0))[0] == pytest.approx(fit(list(profiles), (10, 1.0))[0])
    assert fit(profiles, (10, 2.0)) != fit(profiles, (10, 1.0))
