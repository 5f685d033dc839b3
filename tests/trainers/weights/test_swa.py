"""SWA against the mean of stored ends of epochs and the reference schedule."""

from __future__ import annotations

import pytest
from plain import assert_weights, iterates, mean_of, run_of

from dgavg import UserError, chain, fit


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"start": 0}, [4, 8, 12, 16, 20, 24]),
        ({"start": 0.5}, [16, 20, 24]),
        ({"start": 8}, [8, 12, 16, 20, 24]),
        ({"start": 9}, [12, 16, 20, 24]),
        ({"start": 5, "every": 2}, [8, 16, 24]),
        ({"start": 9, "every": 2}, [12, 20]),
        ({"start": 0.9}, [24]),
    ],
)
def test_the_average_is_that_of_the_ends_of_epochs_from_start_on(settings, steps):
    run = run_of("swa_basic", {"swa": settings}, steps=26)
    found = iterates(run)
    candidate = run.candidates()["swa"]
    expected = mean_of(found[t] for t in steps)
    parameters = {k: v for k, v in candidate.weights.items() if k not in run.buffer_names}
    assert_weights(parameters, {k: expected[k] for k in parameters}, rtol=1e-5, atol=1e-6)
    assert candidate.batchnorm == "recalibrate"


def test_under_the_average_policy_statistics_are_averaged():
    run = run_of("swa_basic", {"swa": {"batchnorm": "average"}})
    found = iterates(run)
    expected = mean_of(found[t] for t in (8, 12))
    assert_weights(run.candidates()["swa"].weights, expected, rtol=1e-5, atol=1e-6)


def rates(**settings):
    run = run_of("swa_basic", {"swa": settings}, steps=20, schedule=lambda t: 1 - t / 40)
    found = []
    fit(run, after_step=lambda run: found.append(run.optimizer.param_groups[0]["lr"]))
    return found


def test_the_rate_eases_from_the_schedule_to_its_end_on_the_way_to_start():
    expected = []
    for t in range(20):
        initial, share = 0.1 * (1 - t / 40), t / 10
        if share <= 0.5:
            factor = 1.0
        elif share <= 0.9:
            factor = 1.0 - (1.0 - 0.02 / initial) * (share - 0.5) / 0.4
        else:
            factor = 0.02 / initial
        expected.append(initial * factor)
    assert rates(start=0.5, lr_final=0.02) == pytest.approx(expected)
    assert expected[-1] == pytest.approx(0.02)


def test_without_an_end_the_rate_is_the_schedules():
    assert rates() == pytest.approx([0.1 * (1 - t / 40) for t in range(20)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": -1}, "swa.start=-1.0: a share of the run below 1"),
        ({"every": 0}, "swa.every=0: at least 1"),
        ({"lr_final": 0.0}, "swa.lr_final=0.0: a learning rate above 0"),
        ({"batchnorm": "reset"}, "swa.batchnorm='reset': choose one of"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        chain("swa_basic", swa=settings)


@pytest.mark.parametrize(("start", "steps"), [(9, 10), (0, 3)])
def test_a_start_that_no_end_of_an_epoch_reaches_is_refused(start, steps):
    with pytest.raises(UserError, match=f"none of 4 steps ends from step {start} to {steps}"):
        run_of("swa_basic", {"swa": {"start": start}}, steps=steps)


def test_a_start_past_the_end_is_refused():
    with pytest.raises(UserError, match=r"swa.start=20 is past the end: the run has 12 steps"):
        run_of("swa_basic", {"swa": {"start": 20}})
