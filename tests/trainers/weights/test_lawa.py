"""LAWA against the mean of the last stored ends of epochs."""

from __future__ import annotations

import pytest
from plain import assert_weights, iterates, mean_of, run_of

from dgavg import UserError, chain
from dgavg.testing import check_link
from dgavg.testing.contract import is_shadow
from dgavg.trainers.weights import lawa  # noqa: F401


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, [8, 12, 16, 20, 24, 28]),
        ({"k": 2}, [24, 28]),
        ({"k": 1}, [28]),
        ({"k": 9}, [4, 8, 12, 16, 20, 24, 28]),
        ({"k": 9, "start": 0.5}, [16, 20, 24, 28]),
        ({"k": 9, "start": 20}, [20, 24, 28]),
        ({"k": 2, "every": 2}, [20, 28]),
        ({"k": 2, "every": 3, "start": 5}, [8, 20]),
    ],
)
def test_the_average_is_that_of_the_last_ends_of_epochs(settings, steps):
    run = run_of("lawa_basic", {"lawa": settings}, steps=30)
    found = iterates(run)
    candidate = run.candidates()["lawa"]
    expected = mean_of(found[t] for t in steps)
    parameters = {k: v for k, v in candidate.weights.items() if k not in run.buffer_names}
    assert_weights(parameters, {k: expected[k] for k in parameters}, rtol=1e-5, atol=1e-6)
    assert candidate.batchnorm == "average"


@pytest.mark.parametrize("policy", ["keep", "average", "recalibrate"])
def test_statistics_are_averaged_under_the_average_policy_and_else_the_newest(policy):
    run = run_of("lawa_basic", {"lawa": {"k": 2, "batchnorm": policy}})
    found = iterates(run)
    candidate = run.candidates()["lawa"]
    assert candidate.batchnorm == policy
    if policy == "average":
        assert_weights(candidate.weights, mean_of([found[8], found[12]]), rtol=1e-5, atol=1e-6)
    else:
        assert all(candidate.weights[k].equal(found[12][k]) for k in run.buffer_names)


def test_it_is_a_shadow_and_keeps_the_contract():
    check_link("lawa", k=2)
    assert is_shadow("lawa_basic", {"lawa": {"k": 2}})


def test_there_is_nothing_to_offer_before_the_first_epoch_ends():
    run = run_of("lawa_basic")
    assert list(run.candidates()) == ["live"]
    run.tap("after_epoch")
    assert list(run.candidates()) == ["live", "lawa"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "lawa.k=0: a number of epochs from 1 on"),
        ({"start": -1}, "lawa.start=-1.0: a share of the run below 1"),
        ({"every": 0}, "lawa.every=0: at least 1"),
        ({"batchnorm": "reset"}, "lawa.batchnorm='reset': choose one of"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        chain("lawa_basic", lawa=settings)


def test_a_start_that_no_end_of_an_epoch_reaches_is_refused():
    with pytest.raises(UserError, match="none of 4 steps ends from step 9 to 11"):
        run_of("lawa_basic", {"lawa": {"start": 9}}, steps=11)
