"""AutoLR against torch's ReduceLROnPlateau and ERM++'s count of drops."""

from __future__ import annotations

import math

import pytest
import torch
from plain import run_of

from dgavg import UserError, chain, fit
from dgavg.testing import check_link

# losses of evaluations at every step; the fifth is better by less than torch's threshold
LOSSES = [1.0, 0.9, 0.95, 0.92, 0.899999, 0.8, 0.9, 0.81, 0.7, 0.9, 0.9, 0.9, 0.9, 0.6, 0.7, 0.7]


def scored(losses, settings=None, *, every=1):
    """A run whose evaluations find the given losses; the learning rates of its steps, too."""
    rates = []
    run = run_of(
        "autolr_basic",
        {"autolr": {"candidate": "live", **(settings or {})}},
        steps=len(losses) * every,
        evaluate=lambda run: {"live": {"accuracy": 0.0, "loss": losses[run.t // every - 1]}},
        eval_every=every,
    )
    fit(run, after_step=lambda run: rates.append(run.optimizer.param_groups[0]["lr"]))
    return run, rates


def reference(losses, patience=1, factor=0.1, limit=3):
    """(rate of each step, steps of the drops): evaluations follow steps 1, 2, …"""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, "min", patience=patience, factor=factor, eps=0
    )
    rates, drops = [], []
    for t, loss in enumerate(losses, start=1):
        rates.append(optimizer.param_groups[0]["lr"])
        plateau.step(loss)
        if optimizer.param_groups[0]["lr"] != rates[-1]:
            drops.append(t)
        if limit and len(drops) == limit:
            break
    return rates, drops


@pytest.mark.parametrize("limit", [0, 1, 2, 3])
@pytest.mark.parametrize("factor", [0.1, 0.5])
@pytest.mark.parametrize("patience", [0, 1, 2])
def test_rates_drops_and_the_end_are_torchs_and_ermpps(patience, factor, limit):
    settings = {"patience": patience, "factor": factor, "limit": limit}
    run, rates = scored(LOSSES, settings)
    expected, drops = reference(LOSSES, patience, factor, limit)
    assert rates == pytest.approx(expected)
    assert run.trainer.found == drops
    assert bool(run.stop) == (limit > 0 and len(drops) == limit)


def test_a_fixed_case_by_hand():
    """Bad at 3 and 4: drop. 5 hardly better: bad, 6 better. Bad at 7, 8: drop. 10, 11: the end."""
    run, rates = scored(LOSSES)
    assert run.trainer.found == [4, 8, 11]
    assert run.t == 11
    assert run.stop == "'autolr' dropped the learning rate at steps 4, 8, 11"
    assert rates == pytest.approx([0.1] * 4 + [0.01] * 4 + [0.001] * 3)


def test_the_drops_replay_the_run():
    run, rates = scored(LOSSES)
    again, same_rates = scored([1.0] * 16, {"drops": run.trainer.found})
    assert same_rates == rates
    assert again.t == run.t
    assert again.stop == run.stop
    fewer, _ = scored([1.0] * 16, {"drops": [4, 8]})
    assert (fewer.t, fewer.stop) == (16, "")


def test_a_replay_ends_at_the_first_evaluation_from_the_last_drop_on():
    run, rates = scored([1.0] * 4, {"drops": [2, 3, 7]}, every=5)
    assert run.t == 10
    assert rates == pytest.approx([0.1] * 2 + [0.01] + [0.001] * 4 + [0.0001] * 3)


def test_a_replay_needs_no_evaluation_and_no_candidate():
    run = run_of("autolr_basic", {"autolr": {"drops": [3]}})
    fit(run)
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_without_evaluations_the_last_of_the_given_drops_ends_the_run():
    run = run_of("autolr_basic", {"autolr": {"drops": [2, 4, 6]}})
    fit(run)
    assert (run.t, run.stop) == (6, "'autolr' dropped the learning rate at steps 2, 4, 6")


def test_drops_past_the_end_are_refused():
    run_of("autolr_basic", {"autolr": {"drops": [12]}}, steps=12)
    with pytest.raises(UserError, match=r"drops=\[3, 13\]: past the end of a run of 12"):
        run_of("autolr_basic", {"autolr": {"drops": [3, 13]}}, steps=12)


def test_evaluations_before_start_do_not_count():
    rising = [1.0] + [2.0] * 11
    assert scored(rising, {"start": 6, "limit": 0})[0].trainer.found == [8, 10, 12]
    assert scored(rising, {"start": 0.5, "limit": 0})[0].trainer.found == [8, 10, 12]


def test_a_candidate_is_watched_once_it_is_there():
    run = run_of(
        "autolr_sma_basic",
        {"autolr": {}, "sma": {"start": 6}},
        evaluate=lambda run: {k: {"accuracy": 0.0, "loss": 1.0} for k in run.candidates()},
        eval_every=1,
    )
    fit(run)
    assert run.trainer.found[0] == 8  # sma is there from step 6 on


def test_nan_is_not_better():
    run, _ = scored([1.0, math.nan, math.nan, 0.5, 0.6, 0.6], {"limit": 0})
    assert run.trainer.found == [3, 6]
    assert scored([math.nan, math.nan, 1.0, 1.0], {"limit": 0})[0].trainer.found == [2]


def test_the_inner_rate_is_what_drops():
    def evaluate(run):
        return {"live": {"accuracy": 0.0, "loss": 1.0}}

    settings = {"autolr": {"candidate": "live", "limit": 0}}
    run = run_of("autolr_basic", settings, evaluate=evaluate, eval_every=1, schedule=lambda t: t)
    rates = []
    fit(run, after_step=lambda run: rates.append(run.optimizer.param_groups[0]["lr"]))
    assert rates[:6] == pytest.approx([0.0, 0.1, 0.2, 0.03, 0.04, 0.005])


def test_another_reason_to_stop_is_kept_and_the_phase_after_the_end_does_not_count():
    losses = [1.0, 1.0, 1.0]
    run, _ = scored(losses, {"limit": 1})
    found = list(run.trainer.found)
    run.closed = True
    run.stop = "else"
    for _ in range(4):
        run.trainer.after_eval(run, {"live": {"loss": 9.0}})
    assert run.trainer.found == found
    run.closed = False
    run.trainer.after_eval(run, {"live": {"loss": 9.0}})
    assert run.stop == "else"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"factor": 0.0}, "factor=0.0: a number between 0 and 1"),
        ({"factor": 1.0}, "factor=1.0: a number between 0 and 1"),
        ({"patience": -1}, "patience=-1: evaluations, 0 or more"),
        ({"limit": -1}, "limit=-1: a number of drops, or 0"),
        ({"start": -1}, "start=-1.0: a number from 0 on"),
        ({"drops": [5, 3]}, r"drops=\[5, 3\]: steps from 1 on, in rising order"),
        ({"drops": [5, 5]}, r"drops=\[5, 5\]: steps from 1 on, in rising order"),
        ({"drops": [0, 5]}, r"drops=\[0, 5\]: steps from 1 on, in rising order"),
        ({"drops": [1, 2, 3, 4]}, "training ends at drop 3; raise trainer.autolr.limit"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        chain("autolr_basic", autolr=settings)


def test_a_candidate_that_nobody_offers_is_refused_with_those_there_are():
    with pytest.raises(UserError, match=r"no candidate 'sma' in .*candidate; .*Known: live, ema"):
        run_of("autolr_ema_basic")


def test_watching_without_an_evaluation_is_refused():
    with pytest.raises(UserError, match="the run has no evaluation: give trainer"):
        run_of("autolr_basic", {"autolr": {"candidate": "live"}})


def test_the_contract():
    check_link("autolr", drops=[5, 8, 12])
    check_link("autolr", candidate="live", patience=0, limit=0)
