"""Early stopping on sequences of scores made by hand."""

from __future__ import annotations

import math

import pytest

from dgavg import UserError
from dgavg.evaluation import Stopping

NAN = math.nan


def scores(*losses):
    return [{"live": {"accuracy": 0.5, "loss": loss}} for loss in losses]


@pytest.mark.parametrize(
    ("losses", "stops"),
    [
        ((1.0,), False),
        ((1.0, 2.0), False),
        ((1.0, 2.0, 1.5), True),
        ((1.0, 2.0, 0.9), False),
        ((3.0, 2.0, 1.0), False),
        ((1.0, 1.0, 1.0), True),  # as low is not lower
        ((1.0, 2.0, 0.9, 2.0), False),
        ((1.0, 2.0, 0.9, 2.0, 0.95), True),
    ],
)
def test_it_stops_after_patience_evaluations_without_a_lower_loss(losses, stops):
    assert bool(Stopping("live", patience=2)(scores(*losses))) is stops


@pytest.mark.parametrize(
    ("losses", "stops"),
    [
        ((NAN, 1.0, 0.5), False),  # what is not a number is never the lowest
        ((NAN, 1.0, 2.0), False),
        ((NAN, 1.0, 2.0, 3.0), True),
        ((1.0, NAN, 0.5), False),
        ((1.0, NAN, NAN), True),
        ((NAN, NAN, NAN), True),
        ((math.inf, 1.0, 0.5), False),
    ],
)
def test_a_loss_that_is_not_a_number_counts_as_not_lower(losses, stops):
    assert bool(Stopping("live", patience=2)(scores(*losses))) is stops


def test_the_reason_names_the_candidate_and_the_wait():
    reason = Stopping("live", patience=2)(scores(1.0, 2.0, 3.0, 4.0))
    assert reason == "the validation loss of 'live' has not fallen for 3 evaluations"


def test_only_evaluations_that_have_the_candidate_count():
    early = [{"live": {"loss": float(i)}} for i in range(9)]
    late = [{"live": {"loss": 9.0}, "swa": {"loss": loss}} for loss in (1.0, 2.0, 3.0)]
    stopping = Stopping("swa", patience=2)
    assert stopping(early) == ""
    assert stopping(early + late[:2]) == ""
    assert stopping(early + late) != ""


def test_without_a_candidate_it_never_stops():
    assert Stopping(patience=1)(scores(1.0, 2.0, 3.0)) == ""
    assert Stopping("live", patience=1)([]) == ""


def test_a_patience_below_1_is_refused():
    with pytest.raises(UserError, match=r"stopping.patience=0: at least 1 evaluation"):
        Stopping("live", patience=0)
