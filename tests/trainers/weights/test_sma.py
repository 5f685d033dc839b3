"""SMA against the mean of stored iterates."""

from __future__ import annotations

import pytest
from plain import assert_weights, iterates, mean_of, run_of

from dgavg import UserError, chain


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"start": 5}, range(5, 13)),
        ({"start": 0}, range(1, 13)),
        ({"start": 0.5}, range(6, 13)),
        ({"start": 2, "every": 3}, range(2, 13, 3)),
        ({"start": 11, "every": 9}, [11]),
        ({"start": 0, "every": 5}, [1, 6, 11]),
    ],
)
def test_the_average_is_that_of_the_iterates_from_start_on(settings, steps):
    run = run_of("sma_basic", {"sma": settings})
    found = iterates(run)
    candidate = run.candidates()["sma"]
    expected = mean_of(found[t] for t in steps)
    assert_weights(candidate.weights, expected, rtol=1e-5, atol=1e-6)
    assert candidate.batchnorm == "average"


@pytest.mark.parametrize("policy", ["keep", "recalibrate"])
def test_under_other_batch_norm_policies_buffers_are_the_newest(policy):
    run = run_of("sma_basic", {"sma": {"start": 5, "batchnorm": policy}})
    iterates(run)
    candidate = run.candidates()["sma"]
    assert candidate.batchnorm == policy
    assert all(candidate.weights[k].equal(run.live[k]) for k in run.buffer_names)
    assert not candidate.weights["classifier.weight"].equal(run.live["classifier.weight"])


def test_there_is_nothing_to_offer_before_the_start():
    run = run_of("sma_basic", {"sma": {"start": 3}})
    offered = []
    for t in range(4):
        offered.append("sma" in run.candidates())
        run.step(run.batches(t))
        run.t += 1
        run.tap("after_step")
    assert offered == [False, False, False, True]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": -1}, "sma.start=-1.0: a share of the run below 1, or a step from 1 on"),
        ({"every": 0}, "sma.every=0: at least 1"),
        ({"batchnorm": "fresh"}, "sma.batchnorm='fresh': choose one of keep, average, recalib"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        chain("sma_basic", sma=settings)


def test_a_start_past_the_end_is_refused():
    with pytest.raises(UserError, match=r"sma.start=100 is past the end: the run has 12 steps"):
        run_of("sma_basic")
