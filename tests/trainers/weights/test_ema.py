"""EMA against its recursion on stored iterates."""

from __future__ import annotations

import math

import pytest
from plain import assert_weights, iterates, run_of

from dgavg import UserError, chain


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, range(1, 13)),
        ({"start": 5}, range(5, 13)),
        ({"start": 0.25}, range(3, 13)),
        ({"start": 4, "every": 3}, range(4, 13, 3)),
    ],
)
def test_the_average_is_the_recursion_from_the_iterate_at_start(settings, steps):
    run = run_of("ema_basic", {"ema": {"decay": 0.8, **settings}})
    found = iterates(run)
    expected = dict(found[steps[0]])
    for t in steps[1:]:
        for k, v in found[t].items():
            expected[k] = 0.8 * expected[k] + 0.2 * v if v.is_floating_point() else v
    candidate = run.candidates()["ema"]
    assert_weights(candidate.weights, expected, rtol=1e-5, atol=1e-6)
    assert candidate.batchnorm == "average"


def test_under_recalibration_buffers_are_the_newest():
    run = run_of("ema_basic", {"ema": {"batchnorm": "recalibrate"}})
    iterates(run)
    candidate = run.candidates()["ema"]
    assert candidate.batchnorm == "recalibrate"
    assert all(candidate.weights[k].equal(run.live[k]) for k in run.buffer_names)


@pytest.mark.parametrize(
    ("settings", "decay"),
    [
        ({"warmup": "power"}, lambda s: 1 - (1 + s) ** (-2 / 3)),
        ({"warmup": "power", "gamma": 4, "power": 0.5}, lambda s: 1 - (1 + s / 4) ** -0.5),
        ({"warmup": "count", "min_decay": 0.3}, lambda s: max((1 + s) / (10 + s), 0.3)),
        ({"warmup": "annealing", "gamma": 2}, lambda s: 1 - 2 / (2 + s)),
        ({"warmup": "exponential", "gamma": 3}, lambda s: 0.8 * (1 - math.exp(-s / 3))),
        ({"warmup": "bias_correction"}, lambda s: 1 - 0.2 / (1 - 0.8 ** (s + 1))),
        ({"half_life": 3}, lambda s: 0.5 ** (1 / 3)),
        ({"half_life": 3, "warmup": "count"}, lambda s: (1 + s) / (10 + s)),
    ],
)
@pytest.mark.parametrize("start", [1, 4])
def test_warm_ups_count_the_steps_since_start(settings, decay, start):
    run = run_of("ema_basic", {"ema": {"decay": 0.8, "start": start, **settings}})
    found = iterates(run)
    expected = dict(found[start])
    most = 0.8 if "half_life" not in settings else 0.5 ** (1 / 3)
    for s, t in enumerate(range(start + 1, 13), start=1):
        d = min(decay(s), most)
        for k, v in found[t].items():
            expected[k] = d * expected[k] + (1 - d) * v if v.is_floating_point() else v
    assert_weights(run.candidates()["ema"].weights, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay": 1.0}, r"ema.decay=1.0: a number in \[0, 1\)"),
        ({"decay": -0.1}, r"ema.decay=-0.1: a number in \[0, 1\)"),
        ({"start": -0.5}, "ema.start=-0.5: a share of the run below 1"),
        ({"every": 0}, "ema.every=0: at least 1"),
        ({"batchnorm": "reset"}, "ema.batchnorm='reset': choose one of"),
        ({"warmup": "slow"}, "ema.warmup=slow: choose one of null, power, count, annealing"),
        ({"gamma": 3.0}, "ema.gamma and min_decay belong to a warm-up"),
        ({"warmup": "power", "gamma": 0.0}, "ema.gamma=0.0: a number above 0"),
        ({"warmup": "count", "min_decay": 1.0}, "ema.min_decay=1.0: a number from 0 to"),
        ({"half_life": 0.0}, "ema.half_life=0.0: a number of updates above 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        chain("ema_basic", ema=settings)


def test_a_start_past_the_end_is_refused():
    with pytest.raises(UserError, match=r"ema.start=12 is past the end: the run has 12 steps"):
        run_of("ema_basic", {"ema": {"start": 12}})
