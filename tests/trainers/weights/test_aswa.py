"""ASWA against lists of stored iterates, under scores that are told in advance."""

from __future__ import annotations

import math

import pytest
from plain import assert_weights, mean_of, run_of

from dgavg import UserError, chain, fit
from dgavg.testing import check_link, check_resume, toy_run
from dgavg.testing.contract import is_shadow, same
from dgavg.testing.toy import toy_evaluate
from dgavg.trainers.weights import aswa  # noqa: F401

# Of live, average and lookahead at steps 3, 6, …, 24, and what comes of it by accuracy.
TOLD = (
    (0.5, None, None),  # first
    (0.6, 0.5, 0.7),  # soft
    (0.9, 0.7, 0.7),  # hard
    (0.8, 0.9, 0.9),  # a tie
    (0.8, 0.9, 1.0),  # soft
    (math.nan, 0.7, 0.8),  # soft: of now, not of then
    (0.9, 0.8, 0.9),  # soft: live does not beat the lookahead
    (0.1, 0.9, 0.2),  # reject
)
TAKEN = ([3], [3, 6], [9], [9], [9, 15], [9, 15, 18], [9, 15, 18, 21], [9, 15, 18, 21])
SOFT = ([3], [3, 6], [3, 6], [3, 6], [3, 6, 15], [3, 6, 15, 18], *[[3, 6, 15, 18, 21]] * 2)


def trained(settings=None, told=TOLD, metric="accuracy", **options):
    """A run, its iterates by step, and the candidates of each evaluation with their weights."""
    told, offered, iterates = iter((*told, (9.0, 0.0, 9.0))), [], {}

    def evaluate(run):
        found = run.candidates()
        copied = {name: {k: v.clone() for k, v in c.weights.items()} for name, c in found.items()}
        offered.append((run.t, found, copied))
        names = ("live", "aswa", "aswa_lookahead")
        values = dict(zip(names, next(told), strict=True))
        return {name: {metric: values[name]} for name in found}

    def note(run):
        iterates[run.t] = {
            k: v.double() if v.is_floating_point() else v.clone() for k, v in run.live.items()
        }

    options = {"steps": 24, "eval_every": 3, "evaluate": evaluate, **options}
    run = run_of("aswa_basic", {"aswa": settings or {}}, **options)
    fit(run, after_step=note)
    return run, iterates, offered


def assert_mean(found, iterates, steps, run):
    parameters = [k for k in found if k not in run.buffer_names]
    expected = mean_of(iterates[t] for t in steps)
    mine, theirs = ({k: w[k] for k in parameters} for w in (found, expected))
    assert_weights(mine, theirs, rtol=1e-5, atol=1e-6)


def check(run, iterates, offered, taken):
    """`taken` has the steps that are in the average after each evaluation."""
    assert [t for t, *_ in offered] == [*range(3, 25, 3), 24]
    assert list(offered[0][1]) == ["live"]
    for (t, candidates, copied), before in zip(offered[1:-1], taken, strict=False):
        assert list(candidates) == ["live", "aswa", "aswa_lookahead"]
        assert_mean(copied["aswa"], iterates, before, run)
        assert_mean(copied["aswa_lookahead"], iterates, [*before, t], run)
        assert [c.probe for c in candidates.values()] == [False, False, True]
        assert {c.batchnorm for c in list(candidates.values())[1:]} == {"recalibrate"}
    assert list(offered[-1][1]) == ["live", "aswa"]  # the last decision, once more
    assert_mean(offered[-1][2]["aswa"], iterates, taken[-1], run)
    assert same(dict(run.candidates()["aswa"].weights), offered[-1][2]["aswa"])
    assert run.closed


def test_the_average_is_what_the_scores_let_in():
    check(*trained(), TAKEN)


def test_without_hard_updates_only_the_lookahead_is_compared():
    check(*trained({"hard": False}), SOFT)


def test_by_loss_lower_is_better_and_other_metrics_say_themselves():
    told = [[v if v is None else -v for v in row] for row in TOLD]
    check(*trained({"metric": "loss"}, told, "loss"), TAKEN)
    check(*trained({"metric": "error", "lower": True}, told, "error"), TAKEN)
    check(*trained({"metric": "loss", "lower": False}, TOLD, "loss"), TAKEN)
    check(*trained({"metric": "f1"}, TOLD, "f1"), TAKEN)


def test_an_accepted_lookahead_is_the_average_to_the_bit_and_a_rejection_changes_nothing():
    _, _, offered = trained()
    weights = [copied for *_, copied in offered]
    for i in (1, 4, 5, 6):  # soft
        assert same(weights[i + 1]["aswa"], weights[i]["aswa_lookahead"])
    for i in (3, 7):  # reject
        assert same(weights[i + 1]["aswa"], weights[i]["aswa"])
    assert same(weights[3]["aswa"], weights[2]["live"])  # hard


@pytest.mark.parametrize(
    ("settings", "counting"),
    [
        ({"start": 7}, [9, 12, 15, 18, 21, 24]),
        ({"every": 3}, [3, 12, 21]),
        ({"start": 0.25, "every": 2}, [6, 12, 18, 24]),
    ],
)
def test_start_and_every_choose_the_evaluations(settings, counting):
    told = [(1.0, 0.0, 2.0)] * 8
    run, iterates, offered = trained(settings, told)
    probed = [t for t, candidates, _ in offered if "aswa_lookahead" in candidates]
    assert probed == counting[1:]
    assert_mean(run.candidates()["aswa"].weights, iterates, counting, run)


@pytest.mark.parametrize("policy", ["keep", "average"])
def test_buffers_are_averaged_under_the_average_policy_and_else_those_of_the_last_taken(policy):
    told = [(1.0, 0.0, 2.0), (1.0, 0.0, 2.0), (1.0, 3.0, 2.0)]
    run, iterates, _ = trained({"batchnorm": policy}, told, steps=9)
    candidate = run.candidates()["aswa"]
    assert candidate.batchnorm == policy
    if policy == "average":
        assert_weights(candidate.weights, mean_of([iterates[3], iterates[6]]))
    else:
        assert all(candidate.weights[k].equal(iterates[6][k]) for k in run.buffer_names)


@pytest.mark.parametrize("settings", [{}, {"metric": "loss", "hard": False}])
def test_it_is_a_shadow_and_keeps_the_contract(settings):
    check_link("aswa", **settings)
    check_resume("aswa_basic", {"aswa": {"every": 2, **settings}}, steps=tuple(range(1, 13)))
    assert is_shadow("aswa_basic", {"aswa": settings})


def test_on_real_scores_the_loss_never_rises():
    run = toy_run("aswa_basic", {"aswa": {"metric": "loss"}})
    fit(run)
    losses = [s["aswa"]["loss"] for s in run.scores if "aswa" in s]
    assert len(losses) == 4
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric": ""}, "aswa.metric='': such as accuracy or loss"),
        ({"start": -1}, "aswa.start=-1.0: a share of the run below 1"),
        ({"every": 0}, "aswa.every=0: at least 1"),
        ({"batchnorm": "reset"}, "aswa.batchnorm='reset': choose one of"),
        ({"lower": 3}, "aswa.lower=3 must be true or false or null"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        chain("aswa_basic", aswa=settings)


def test_a_start_past_the_end_is_refused():
    with pytest.raises(UserError, match=r"aswa.start=12 is past the end: the run has 12 steps"):
        run_of("aswa_basic", {"aswa": {"start": 12}}, evaluate=toy_evaluate)


def test_a_run_without_evaluations_is_refused():
    with pytest.raises(UserError, match=r"on validation data: give the run evaluate=\.\.\."):
        run_of("aswa_basic")


def test_scores_that_lack_the_metric_or_a_candidate_are_refused():
    run = run_of("aswa_basic", {"aswa": {"metric": "f1"}}, evaluate=toy_evaluate)
    with pytest.raises(UserError, match=r"aswa\.metric=f1: evaluate\(run\) gives accuracy, loss"):
        fit(run)
    run = run_of("aswa_basic", evaluate=lambda run: {"live": {"accuracy": 1.0}}, eval_every=6)
    with pytest.raises(
        UserError, match=r"compares 'aswa', but evaluate\(run\) gave no score for it"
    ):
        fit(run)
