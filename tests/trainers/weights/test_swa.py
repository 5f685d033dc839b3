"""SWA against the mean of stored ends of epochs and the reference schedule."""

from __future__ import annotations

import math

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


def test_a_late_schedule_measures_the_whole_run_from_start_on():
    expected = []
    for t in range(20):
        initial = 0.1 * (1 - t / 40)
        share = min(max((t / 20 - 0.5) / 0.4, 0), 1) if t >= 12 else 0
        expected.append(initial + (0.02 - initial) * share)
    assert rates(start=12, lr_final=0.02, schedule="late") == pytest.approx(expected)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_an_annealed_schedule_eases_within_epochs_after_start(shape):
    expected = []
    for t in range(20):
        initial, s = 0.1 * (1 - t / 40), min(max((t - 6) / 8, 0), 1)
        share = s if shape == "linear" else (1 - math.cos(math.pi * s)) / 2
        expected.append(initial + (0.02 - initial) * share)
    found = rates(start=6, lr_final=0.02, schedule=shape, anneal=2)
    assert found == pytest.approx(expected)


def test_cycles_end_low_where_weights_count():
    settings = {"start": 8, "every": 2, "lr_final": 0.02, "lr_high": 0.06, "schedule": "cyclic"}
    run = run_of("swa_basic", {"swa": settings}, steps=26)
    found, counts = [], []
    fit(
        run,
        after_step=lambda run: (
            found.append(run.optimizer.param_groups[0]["lr"]),
            counts.append(next(iter(run.trainer)).average.count),
        ),
    )
    counted = [t for t in range(26) if counts[t] > (counts[t - 1] if t else 0)]
    assert counted == [7, 15, 23]  # the steps that end epochs 2, 4, 6
    assert [found[t] for t in counted] == pytest.approx([0.025, 0.02, 0.02])  # the ramp, the cycles
    assert found[8:16] == pytest.approx([0.06 - 0.04 * i / 8 for i in range(1, 9)])
    assert found[0] == pytest.approx(0.1)


def test_triangles_are_low_where_weights_count():
    settings = {"start": 8, "every": 2, "lr_final": 0.02, "schedule": "triangle"}
    run = run_of("swa_basic", {"swa": settings}, steps=26)
    found = []
    fit(run, after_step=lambda run: found.append(run.optimizer.param_groups[0]["lr"]))
    assert found[:4] == pytest.approx([0.1] * 4)
    assert found[4:13] == pytest.approx(
        [0.1 - 0.02 * i for i in range(5)] + [0.04, 0.06, 0.08, 0.1]
    )
    assert found[8] == found[16] == found[24] == pytest.approx(0.02)


@pytest.mark.parametrize("schedule", ["cyclic", "triangle"])
def test_cycles_stay_at_their_low_end_once_the_schedule_has_fallen_below_it(schedule):
    settings = {"start": 8, "lr_final": 0.05, "schedule": schedule}
    run = run_of("swa_basic", {"swa": settings}, steps=24, schedule=lambda t: 1 - t / 24)
    found = []
    fit(run, after_step=lambda run: found.append(run.optimizer.param_groups[0]["lr"]))
    assert found[16:] == pytest.approx([0.05] * 8)
    with pytest.raises(UserError, match=r"swa.lr_final=0.2: at most the initial rate, 0.1, or set"):
        run_of("swa_basic", {"swa": {**settings, "lr_final": 0.2}}, steps=24)


def test_without_an_end_the_rate_is_the_schedules():
    assert rates() == pytest.approx([0.1 * (1 - t / 40) for t in range(20)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": -1}, "swa.start=-1.0: a share of the run below 1"),
        ({"every": 0}, "swa.every=0: at least 1"),
        ({"lr_final": 0.0}, "swa.lr_final=0.0: a learning rate above 0"),
        ({"batchnorm": "reset"}, "swa.batchnorm='reset': choose one of"),
        ({"schedule": "saw"}, "swa.schedule=saw: choose one of constant, late"),
        ({"schedule": "cosine"}, "leads to a learning rate: set trainer.swa.lr_final"),
        ({"lr_final": 0.1, "lr_high": 0.2}, "only schedule=cyclic and triangle have one"),
        (
            {"lr_final": 0.1, "lr_high": 0.05, "schedule": "cyclic"},
            "swa.lr_high=0.05: at least lr_final, 0.1",
        ),
        ({"anneal": 0}, "swa.anneal=0: epochs, at least 1"),
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
