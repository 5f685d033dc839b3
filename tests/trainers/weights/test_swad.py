"""SWAD against the mean of stored iterates, under losses that are told in advance."""

from __future__ import annotations

import math

import pytest
from plain import assert_weights, mean_of, run_of

from dgavg import UserError, chain, fit
from dgavg.testing import check_link, check_resume, toy_run
from dgavg.testing.contract import is_shadow, same
from dgavg.testing.toy import toy_evaluate
from dgavg.trainers.weights import swad  # noqa: F401

LOSSES = (3.0, 1.0, 2.0, 1.1, 1.2, 5.0, 5.0, 0.5)  # of evaluations at steps 3, 6, …, 24
SMALL = {"n_converge": 2, "n_tolerance": 2}


def trained(settings, losses=LOSSES, spec="swad_basic", **options):
    """A run, its iterates by step, and what `swad` offered at each evaluation."""
    told, offered, iterates = iter((*losses, 9.0)), [], {}

    def evaluate(run):
        found = run.candidates()
        copied = {k: v.clone() for k, v in found["swad"].weights.items()} if "swad" in found else {}
        offered.append((run.t, copied))
        return {"live": {"loss": next(told), "accuracy": 0.0}, "swad": {"loss": 0.0}}

    def note(run):
        iterates[run.t] = {
            k: v.double() if v.is_floating_point() else v.clone() for k, v in run.live.items()
        }

    options = {"steps": 3 * len(losses), "eval_every": 3, "evaluate": evaluate, **options}
    run = run_of(spec, {"swad": settings}, **options)
    fit(run, after_step=note)
    return run, iterates, offered


def assert_mean(found, iterates, steps, run):
    parameters = [k for k in found if k not in run.buffer_names]
    expected = mean_of(iterates[t] for t in steps)
    mine, theirs = ({k: w[k] for k in parameters} for w in (found, expected))
    assert_weights(mine, theirs, rtol=1e-5, atol=1e-6)


def test_each_evaluation_offers_what_the_losses_before_it_say():
    run, iterates, offered = trained(SMALL)
    assert [t for t, _ in offered] == [*range(3, 25, 3), 24]
    expected = {
        3: range(1, 4),  # before the loss has turned, the iterates since the last evaluation
        6: range(4, 7),
        9: range(7, 10),
        12: range(6, 10),  # the loss of step 9 has shown that of step 6 to be a minimum
        15: range(6, 13),
        18: range(6, 16),
        21: range(6, 19),  # one above 1.3
        24: range(6, 16),  # two of them: the valley has ended, and lower losses come too late
    }
    for t, found in offered:
        assert_mean(found, iterates, expected[t], run)
    assert (run.stop, run.t) == ("", 24)


def test_the_loss_of_the_last_step_counts_in_the_evaluation_after_it():
    run, iterates, offered = trained(SMALL, LOSSES[:5])
    (before, *_), (after, last) = offered[-2:]
    assert before == after == 15
    assert_mean(offered[-2][1], iterates, range(6, 13), run)
    assert_mean(last, iterates, range(6, 16), run)
    assert same(last, dict(run.candidates()["swad"].weights))
    assert run.closed


def test_rule_code_averages_segments_as_the_authors_code():
    run, iterates, _ = trained({"rule": "code", **SMALL}, (3.0, 1.0, 1.5, 1.1, 1.2, 5.0, 5.0, 0.5))
    # The threshold is 1.3 · 1.25; with queues of one length the lowest segment itself is left out.
    assert_mean(run.candidates()["swad"].weights, iterates, range(7, 16), run)
    losses = (2.0, 1.4, 1.2, 1.0, 1.3, 1.1, 5.0, 5.0, 5.0)
    run, iterates, _ = trained({"rule": "code", "n_converge": 2, "n_tolerance": 4}, losses)
    # Lowest is segment 3; at once the one before it counts and itself, and itself once more later.
    twice = [10, 11, 12]
    assert_mean(run.candidates()["swad"].weights, iterates, [*range(7, 19), *twice], run)


def test_stop_ends_the_run_with_the_valley():
    run, iterates, offered = trained({"stop": True, **SMALL})
    assert run.stop == "the valley of 'swad' has ended"
    assert run.t == 21
    assert [t for t, _ in offered] == [*range(3, 22, 3), 21]
    assert_mean(offered[-1][1], iterates, range(6, 16), run)
    run, *_ = trained({"stop": True, "n_converge": 2, "n_tolerance": 3})
    assert (run.stop, run.t) == ("", 24)


def test_another_reason_to_stop_is_left_alone():
    def stopping(scores):
        return "enough" if len(scores) == 4 else ""

    run, *_ = trained({"stop": True, **SMALL}, stopping=stopping)
    assert (run.stop, run.t) == ("enough", 12)


@pytest.mark.parametrize(("start", "steps"), [(7, [9, 10, 11, 12]), (0.25, [6])])
def test_evaluations_before_the_start_are_not_in_the_valley(start, steps):
    losses = (0.1, 0.2, 1.0, 1.1, 5.0, 5.0, 5.0, 5.0)
    run, iterates, offered = trained({"start": start, **SMALL}, losses)
    assert [t for t, found in offered if found] == [*range(steps[0], 25, 3), 24]
    assert_mean(offered[-1][1], iterates, steps, run)


def test_every_second_iterate_counts():
    run, iterates, offered = trained({"every": 2, "n_converge": 1, "n_tolerance": 2}, [1.0] * 4)
    assert_mean(offered[0][1], iterates, [1, 3], run)
    assert_mean(offered[-1][1], iterates, [3, 5, 7, 9, 11], run)


@pytest.mark.parametrize("policy", ["keep", "recalibrate", "average"])
def test_buffers_are_averaged_under_the_average_policy_and_else_the_newest(policy):
    run, iterates, _ = trained({"batchnorm": policy, "n_converge": 1}, [1.0, 1.0])
    candidate = run.candidates()["swad"]
    assert candidate.batchnorm == policy
    expected = mean_of(iterates[t] for t in (3, 4, 5, 6))
    if policy == "average":
        assert_weights(candidate.weights, expected, rtol=1e-5, atol=1e-6)
    else:
        assert all(candidate.weights[k].equal(run.live[k]) for k in run.buffer_names)


def test_the_defaults_are_the_authors():
    link = chain("swad_basic")
    assert (link.n_converge, link.n_tolerance, link.tolerance_ratio) == (3, 6, 0.3)
    assert (link.rule, link.batchnorm, link.stop) == ("paper", "recalibrate", False)


@pytest.mark.parametrize("settings", [SMALL, {"rule": "code", "n_converge": 1, "n_tolerance": 3}])
def test_it_is_a_shadow_and_keeps_the_contract(settings):
    check_link("swad", **settings)
    assert is_shadow("swad_basic", {"swad": settings})


@pytest.mark.parametrize("rule", ["paper", "code"])
@pytest.mark.parametrize("stop", [False, True])
def test_it_resumes_to_the_bit_after_every_step(rule, stop):
    settings = {"rule": rule, "stop": stop, "n_converge": 1, "n_tolerance": 2}
    settings |= {"tolerance_ratio": 0.0}
    check_resume("swad_basic", {"swad": settings}, steps=tuple(range(1, 13)))


def test_it_reads_the_loss_of_the_live_weights():
    run = toy_run("swad_basic", {"swad": {"n_converge": 1, "n_tolerance": 1}})
    fit(run)
    losses = [s["live"]["loss"] for s in run.scores[:-1]]
    assert len(losses) == 4
    assert next(iter(run.trainer)).average.rule.lowest == losses[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_converge": 0}, "swad.n_converge=0: a number of evaluations from 1 on"),
        ({"n_tolerance": 0}, "swad.n_tolerance=0: a number of evaluations from 1 on"),
        ({"tolerance_ratio": -0.1}, "swad.tolerance_ratio=-0.1: a share of the loss from 0 on"),
        ({"tolerance_ratio": math.inf}, "swad.tolerance_ratio=inf: a share of the loss from 0"),
        ({"rule": "khanrc"}, "swad.rule=khanrc: choose one of paper, code"),
        ({"start": -1}, "swad.start=-1.0: a share of the run below 1"),
        ({"every": 0}, "swad.every=0: at least 1"),
        ({"batchnorm": "reset"}, "swad.batchnorm='reset': choose one of"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        chain("swad_basic", swad=settings)


def test_a_run_without_evaluations_is_refused():
    with pytest.raises(UserError, match=r"the validation loss: give the run evaluate=\.\.\."):
        run_of("swad_basic")


@pytest.mark.parametrize(
    ("settings", "steps", "count"),
    [({}, 6, 2), ({"n_converge": 5}, 12, 4), ({"start": 7}, 12, 2), ({"n_converge": 4}, 7, 3)],
)
def test_a_run_with_too_few_evaluations_is_refused(settings, steps, count):
    options = {"evaluate": toy_evaluate, "eval_every": 3}
    wanted = settings.get("n_converge", 3)
    with pytest.raises(UserError, match=f"swad needs {wanted} evaluations .* here are {count}: "):
        run_of("swad_basic", {"swad": settings}, steps=steps, **options)
    enough = {**settings, "n_converge": count}
    run_of("swad_basic", {"swad": enough}, steps=steps, **options)
