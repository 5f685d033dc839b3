"""ExponentialMean against its recursion on stored snapshots, written anew in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dgavg.averaging import AnnealedMean, ExponentialMean, RunningMean

ROWS = np.random.default_rng(0).normal(size=(60, 20)).astype(np.float32)


def fed(make, rows=ROWS):
    """The weights after each update with one of `rows`; none before the first that counts."""
    live = {"w": torch.zeros(rows.shape[1])}
    average, found = make(live), []
    for row in rows:
        live["w"].copy_(torch.from_numpy(row))
        average.update(live)
        found.append(average.weights()["w"].numpy().copy() if average.count else None)
    return found


def recursion(rates, rows=ROWS):
    """a ← a + r·(w − a) with the rates of the second update and later ones."""
    exact = [rows[0].astype(np.float64)]
    for row, rate in zip(rows[1:], rates, strict=False):
        exact.append(exact[-1] + rate * (row - exact[-1]))
    return exact


def assert_close(found, exact, rtol=1e-4):
    assert len(found) == len(exact)
    for a, b in zip(found, exact, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_many_updates_equal_the_recursion_in_float64(decay):
    rows = np.random.default_rng(1).normal(size=(1000, 20)).astype(np.float32)
    found = fed(lambda live: ExponentialMean(live, decay=decay), rows)
    assert_close(found, recursion([1 - decay] * 999, rows))


@pytest.mark.parametrize(
    "options",
    [
        {"decay": 0.5 ** (1 / 8)},
        {"momentum": 1 - 0.5 ** (1 / 8)},
        {"half_life": 8},
    ],
)
def test_decay_momentum_and_half_life_say_the_same(options):
    found = fed(lambda live: ExponentialMean(live, **options))
    assert_close(found, recursion([1 - 0.5 ** (1 / 8)] * 59))


def test_the_default_decay():
    found = fed(lambda live: ExponentialMean(live))
    assert_close(found, recursion([0.001] * 59))


@pytest.mark.parametrize("interval", [1, 3, 4, 12])
def test_a_half_life_is_counted_in_calls_whatever_the_interval(interval):
    """After 12 calls half of the first weights is left."""
    live = {"w": torch.ones(1)}
    average = ExponentialMean(live, half_life=12, interval=interval)
    for _ in range(13):
        average.update(live)
        live["w"].zero_()
    assert average.weights()["w"].item() == pytest.approx(0.5)


@pytest.mark.parametrize("decay", [0.0, 0.7, 0.9999])
def test_bias_correction_gives_all_weights_a_sum_of_1_and_the_first_its_share(decay):
    found = fed(lambda live: ExponentialMean(live, decay=decay, bias_correction=True))
    for n, average in enumerate(found, start=1):
        shares = decay ** np.arange(n - 1.0, -1, -1)
        exact = (shares[:, None] * ROWS[:n]).sum(axis=0) / shares.sum()
        np.testing.assert_allclose(average, exact, rtol=1e-4, atol=1e-6)


WARMUPS = {  # the decay s calls after the first that counts
    "power": lambda s, d, gamma=1.0, power=2 / 3: min(d, 1 - (1 + s / gamma) ** -power),
    "count": lambda s, d: min(d, (1 + s) / (10 + s)),
    "annealing": lambda s, d, gamma=100.0: 1 - max(1 - d, gamma / (gamma + s)),
    "exponential": lambda s, d, gamma=2000.0: d * (1 - math.exp(-s / gamma)),
}


@pytest.mark.parametrize(
    ("warmup", "options"),
    [
        ("power", {}),
        ("power", {"gamma": 7.0}),
        ("power", {"gamma": 2.0, "power": 1.5}),
        ("count", {}),
        ("annealing", {}),
        ("annealing", {"gamma": 5}),
        ("exponential", {}),
        ("exponential", {"gamma": 3.0}),
    ],
)
@pytest.mark.parametrize("decay", [0.6, 0.999])
@pytest.mark.parametrize(("start", "interval"), [(0, 1), (4, 3)])
@pytest.mark.parametrize("min_decay", [0.0, 0.3])
def test_warm_ups_follow_their_formula(warmup, options, decay, start, interval, min_decay):
    found = fed(
        lambda live: ExponentialMean(
            live,
            decay=decay,
            warmup=warmup,
            min_decay=min_decay,
            start=start,
            interval=interval,
            **options,
        )
    )
    assert found[:start] == [None] * start
    rows = ROWS[start::interval]
    rates = [
        1 - max(min_decay, WARMUPS[warmup](s, decay, **options))
        for s in range(interval, interval * len(rows), interval)
    ]
    assert_close(found[start::interval], recursion(rates, rows))


def test_a_warm_up_ends_at_the_decay():
    live = {"w": torch.zeros(1)}
    average = ExponentialMean(live, decay=0.9, warmup="power")
    average.calls, average.count = 10**6, 10**6
    assert average.rate() == pytest.approx(0.1)


def test_annealing_by_1_is_a_running_mean_until_the_momentum():
    annealed = fed(lambda live: AnnealedMean(live, momentum=0.05, gamma=1))
    running = fed(RunningMean)
    assert_close(annealed[:20], running[:20])
    assert not np.allclose(annealed[-1], running[-1], atol=1e-3)


def test_annealed_means_have_mmengines_defaults():
    average = AnnealedMean({"w": torch.zeros(1)})
    assert average.decay == pytest.approx(1 - 0.0002)
    average.calls = average.count = 50
    assert average.rate() == pytest.approx(100 / 150)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, r"decay=1.0: a number in \[0, 1\)"),
        ({"decay": -0.1}, r"decay=-0.1: a number in \[0, 1\)"),
        ({"decay": math.nan}, r"decay=nan: a number in \[0, 1\)"),
        ({"momentum": 0.0}, r"momentum=0.0: a number in \(0, 1\]"),
        ({"momentum": 1.1}, r"momentum=1.1: a number in \(0, 1\]"),
        ({"momentum": 1e-17}, "momentum=1e-17, half_life=None: too long, d rounds to 1"),
        ({"half_life": 0}, "half_life=0: a number of updates above 0"),
        ({"half_life": math.inf}, "half_life=inf: a number of updates above 0"),
        ({"half_life": 1e17}, "momentum=None, half_life=1e.17: too long"),
        ({"decay": 0.9, "momentum": 0.1}, "say the same: give one of them"),
        ({"decay": 0.9, "half_life": 3}, "say the same: give one of them"),
        ({"warmup": "linear"}, "warmup='linear': choose one of power, count, annealing"),
        ({"warmup": "power", "bias_correction": True}, "both free it of the start: choose one"),
        ({"gamma": 3.0}, "gamma and min_decay belong to a warm-up"),
        ({"min_decay": 0.1}, "gamma and min_decay belong to a warm-up"),
        ({"warmup": "count", "gamma": 3.0}, "gamma=3.0: "),
        ({"warmup": "power", "gamma": 0.0}, "gamma=0.0: a number above 0"),
        ({"warmup": "power", "gamma": math.inf}, "gamma=inf: a number above 0"),
        ({"warmup": "power", "power": 0.0}, "power=0.0: a number above 0"),
        ({"warmup": "power", "power": math.inf}, "power=inf: a number above 0"),
        ({"power": 0.75}, "power=0.75: belongs to warmup='power'"),
        ({"warmup": "count", "power": 0.75}, "power=0.75: belongs to warmup='power'"),
        ({"warmup": "power", "decay": 0.5, "min_decay": 0.6}, "min_decay=0.6: a number from 0 to"),
        ({"warmup": "power", "min_decay": -0.1}, "min_decay=-0.1: a number from 0 to the decay"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ExponentialMean({"w": torch.zeros(1)}, **options)


@pytest.mark.parametrize("options", [{"momentum": 1.0}, {"decay": 0.0}, {"half_life": 1e-9}])
def test_no_memory_at_all_is_the_newest_weights(options):
    found = fed(lambda live: ExponentialMean(live, **options))
    assert_close(found, ROWS, rtol=0)
