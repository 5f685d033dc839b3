"""Schedules in place of numbers: their curves, what they refuse, and that links follow them."""

from __future__ import annotations

import io
import math
from dataclasses import fields

import pytest
import torch
from links import ACTING

from dgavg import Run, Trainer, UserError, chain, fit, trainer
from dgavg.chain import find_trainer, settings_of
from dgavg.schedules import curve_of
from dgavg.testing import ToyBatches, check_resume, toy_model, toy_run
from dgavg.testing.contract import same
from dgavg.trainer import fixed, may_be_scheduled
from dgavg.trainers import IRM, Basic

NAME = "trainer.irm.weight"


def values(spec, steps=8):
    curve = curve_of(spec, steps, NAME)
    return [pytest.approx(curve(t)) for t in range(steps)]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"constant": {"value": 3}}, [3] * 8),
        ({"linear": {"to": 8}}, list(range(8))),
        ({"linear": {"from": 4, "to": 0, "start": 2, "steps": 4}}, [4, 4, 4, 3, 2, 1, 0, 0]),
        ({"warmup_linear": {"to": 10, "steps": 0.25}}, [0, 5, *[10] * 6]),
        ({"cosine": {"to": 1, "steps": 4}}, [0, 0.5 - 0.5**1.5, 0.5, 0.5 + 0.5**1.5, *[1] * 4]),
        (
            {"warmup_exponential": {"to": 2}},
            [2 * (2 / (1 + math.exp(-10 * t / 8)) - 1) for t in range(8)],
        ),
        ({"step": {"values": [1, 5, 2], "at": [2, 0.5]}}, [1, 1, 5, 5, 2, 2, 2, 2]),
        ({"anneal_after": {"step": 3, "to": 100}}, [1, 1, 1, *[100] * 5]),
        ({"anneal_after": {"step": 0.5, "from": 0, "to": 7}}, [0] * 4 + [7] * 4),
        (lambda t: t * t, [t * t for t in range(8)]),
    ],
)
def test_a_schedule_is_its_curve(spec, expected):
    assert values(spec) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, r"weight=\{\}: one schedule, such as \{linear: "),
        ({"linear": {"to": 1}, "cosine": {"to": 1}}, "one schedule, such as"),
        ({"liner": {"to": 1}}, "no schedule 'liner' in trainer.irm.weight; did you mean 'linear'"),
        ({"linear": 10}, "weight.linear=10: its settings are a dict, such as"),
        (
            {"linear": {"too": 1}},
            "no setting 'too' in trainer.irm.weight.linear; did you mean 'to'",
        ),
        ({"linear": {"shape": "x", "to": 1}}, "no setting 'shape'"),
        ({"linear": {}}, "weight.linear.to is missing"),
        ({"linear": {"to": "ten"}}, "weight.linear.to='ten': a finite number"),
        ({"linear": {"to": math.inf}}, "weight.linear.to=inf: a finite number"),
        ({"linear": {"to": True}}, "weight.linear.to=True: a finite number"),
        ({"linear": {"to": 1, "steps": 9}}, "linear ends 1 steps past the end: the run has 8"),
        ({"linear": {"to": 1, "start": 4, "steps": 5}}, "ends 1 steps past the end"),
        ({"linear": {"to": 1, "steps": 2.5}}, r"linear.steps=2.5: whole steps"),
        ({"linear": {"to": 1, "steps": 0}}, r"linear.steps=0: whole steps"),
        ({"linear": {"to": 1, "start": 8}}, "linear.start=8 is past the end: the run has 8 steps"),
        ({"linear": {"to": 1, "start": -1}}, "linear.start=-1: a share of the run below 1, or"),
        ({"step": {"values": [1, 2], "at": 3}}, "step.at=3: a list of numbers"),
        ({"step": {"values": [1, 2], "at": [3, 4]}}, "one value more than steps in `at`"),
        ({"step": {"values": [1, 2, 3], "at": [4, 3]}}, "steps in rising order"),
        ({"anneal_after": {"step": 8, "to": 1}}, "anneal_after.step=8 is past the end"),
    ],
)
def test_a_schedule_that_cannot_work_is_refused(spec, message):
    with pytest.raises(UserError, match=message):
        curve_of(spec, 8, NAME)


def test_a_link_reads_the_number_of_the_step_and_says_the_schedule():
    seen = []

    @trainer("watch")
    class Watch(Trainer):
        """Notes its setting where it trains and in the tap after it."""

        weight: float = 1.0

        def loss(self, run, batch):
            seen.append((run.t, self.weight))
            return self.inner.loss(run, batch)

        def after_step(self, run):
            seen.append((run.t, self.weight))

    spec = {"linear": {"to": 12}}
    run = toy_run("watch_basic", {"watch": {"weight": spec}})
    fit(run)
    assert seen == [(t + after, float(t)) for t in range(12) for after in (0, 1)]
    assert settings_of(run.trainer)["watch"] == {"weight": spec}
    check_resume("watch_basic", {"watch": {"weight": spec}})


def test_every_number_that_a_schedule_gives_is_checked_before_training():
    with pytest.raises(
        UserError, match=r"trainer.irm.weight=-1.0: a finite number from 0 on \(step \d+ of"
    ):
        toy_run("irm_basic", {"irm": {"anneal": 0, "weight": {"linear": {"from": 10, "to": -2}}}})
    with pytest.raises(UserError, match=r"trainer.irm.weight is nan at step 3"):
        toy_run("irm_basic", {"irm": {"anneal": 0, "weight": lambda t: math.nan if t == 3 else 1}})
    with pytest.raises(UserError, match=r"a function of the step, .* takes 0 positional arguments"):
        toy_run("irm_basic", {"irm": {"anneal": 0, "weight": lambda: 1}})
    with pytest.raises(UserError, match=r"weight at step 0='0' must be a number, not str"):
        toy_run("irm_basic", {"irm": {"anneal": 0, "weight": str}})


def test_a_number_that_is_read_once_takes_no_schedule():
    with pytest.raises(
        UserError, match=r"irm.anneal is read once, before the first step: it takes"
    ):
        IRM(Basic(), anneal={"linear": {"to": 1}})


def test_a_whole_number_follows_a_schedule_of_whole_numbers():
    seen = []
    run = toy_run("dial_basic", {"dial": {"steps": {"step": {"values": [1, 3], "at": [6]}}}})
    fit(run, after_step=lambda run: seen.append(run.trainer.steps))
    assert seen == [1] * 6 + [3] * 6
    assert all(type(steps) is int for steps in seen)
    with pytest.raises(UserError, match=r"trainer.dial.steps is 1.5 at step 1: an integer; a step"):
        toy_run("dial_basic", {"dial": {"steps": {"linear": {"from": 1, "to": 7}}}})
    with pytest.raises(UserError, match=r"swag.rank is read once, before the first step"):
        chain("swag_basic", swag={"rank": {"linear": {"to": 3}}})


def test_a_text_takes_no_schedule():
    with pytest.raises(UserError, match=r"warmup=\{'linear': \{'to': 1\}\} must be a text or null"):
        chain("ema_basic", ema={"warmup": {"linear": {"to": 1}}})


def test_other_settings_beside_a_schedule_are_checked_when_the_run_is_made():
    with pytest.raises(UserError, match=r"trainer.ema.warmup=fast: choose one of"):
        toy_run("ema_basic", {"ema": {"decay": {"linear": {"to": 0.9}}, "warmup": "fast"}})


# Act where the learning rate falls, or at evaluations.
ELSEWHERE = {("gsam", "rho_min"), ("autolr", "patience"), ("autolr", "limit")}
VALUES = {("sandmask", "k"): 1e-4}  # where the value of ACTING is one that hardly matters


def scheduled():
    """Every number of every link that may follow a schedule, with two values it may have."""
    for name in ACTING:
        cls = find_trainer(name)
        for f in fields(cls):
            free = f.init and f.name != "inner" and may_be_scheduled(cls, f.name)
            if free and (name, f.name) not in ELSEWHERE:
                yield pytest.param(name, f.name, id=f"{name}.{f.name}")


@pytest.mark.parametrize(("name", "key"), list(scheduled()))
def test_training_follows_the_schedule_of_every_number(name, key):
    """From step 6 on another value: training is that of neither alone."""
    first = {**ACTING[name]}.get(key, getattr(find_trainer(name)(Basic()), key))
    first = VALUES.get((name, key), 0.5 if first is None else first)
    second = first / 2 if first else 0.5
    second = max(first - 1, 1) if isinstance(first, int) and not isinstance(first, bool) else second

    def trained(value):
        run = toy_run(f"{name}_basic", {name: {**ACTING[name], key: value}})
        fit(run)
        return {
            **run.live,
            **{k: v for c in run.candidates().values() for k, v in c.weights.items()},
        }

    step = trained({"step": {"values": [first, second], "at": [6]}})
    assert same(trained({"constant": {"value": first}}), trained(first))
    assert not same(step, trained(first)), "the second value changed nothing"
    assert not same(step, trained(second)), "the first value changed nothing"


def test_ema_follows_a_schedule_of_its_decay():
    run = toy_run("ema_basic", {"ema": {"decay": {"linear": {"from": 0.2, "to": 0.8}}}})
    expected = None

    def note(run):
        nonlocal expected
        w = run.live["classifier.weight"].double()
        decay = 0.2 + 0.6 * (run.t - 1) / 12
        expected = w.clone() if expected is None else decay * expected + (1 - decay) * w

    fit(run, after_step=note)
    found = run.candidates()["ema"].weights["classifier.weight"]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(
        UserError, match=r"decay follows a schedule: leave out half_life and warmup"
    ):
        toy_run("ema_basic", {"ema": {"decay": {"linear": {"to": 0.9}}, "warmup": "count"}})


def test_the_smallest_radius_of_gsam_follows_a_schedule_where_the_rate_falls():
    found = []
    for rho_min in (0.1, {"step": {"values": [0.1, 0.3], "at": [6]}}):
        torch.manual_seed(0)
        settings = {"gsam": {"rho": 0.5, "rho_min": rho_min}}
        falling = {"schedule": lambda t: 1 - t / 12}
        run = Run(chain("gsam_basic", **settings), toy_model(), ToyBatches(), steps=12, **falling)
        fit(run)
        found.append(dict(run.live))
    assert not same(*found)


@pytest.mark.parametrize("spec", ["twa_irm_basic", "twa_sam_basic"])
def test_a_phase_after_the_last_step_goes_by_its_numbers_after_a_resume_too(spec):
    settings = {
        "twa": {"start": 0, "samples": 3, "steps": 4},
        "irm": {"weight": {"linear": {"to": 1000}}},
        "sam": {"rho": {"linear": {"to": 1}}},
    }
    settings = {k: v for k, v in settings.items() if k in spec}
    whole, file = toy_run(spec, settings), io.BytesIO()

    def save(run):
        if run.t == run.steps and not run.closed:
            torch.save(run.state_dict(), file)

    fit(whole, after_eval=save)
    file.seek(0)
    again = toy_run(spec, settings)
    again.load_state_dict(torch.load(file, weights_only=True))
    fit(again)
    assert same(whole.state_dict(), again.state_dict())


def test_a_schedule_of_the_weight_takes_the_place_of_annealing():
    """No jump and no reset of the optimizer at the default step, which this run does not reach."""
    run = toy_run("irm_basic", {"irm": {"weight": {"constant": {"value": 7}}}})
    other = toy_run("irm_basic", {"irm": {"weight": 7, "anneal": 0}})
    fit(run), fit(other)
    assert same(run.live, other.live)
    with pytest.raises(UserError, match=r"trainer.irm.anneal=500 is past the end"):
        toy_run("irm_basic")


def test_a_chain_is_shown_as_python_writes_it_and_keeps_its_schedule():
    spec = {"linear": {"to": 10}}
    link = IRM(Basic(), weight=spec, anneal=0)
    assert repr(link) == "IRM(Basic(), weight={'linear': {'to': 10}}, anneal=0.0)"
    spec["linear"]["to"] = 99
    assert link.settings()["weight"] == {"linear": {"to": 10}}


def test_fixed_numbers_are_settings_like_others():
    @trainer("once")
    class Once(Trainer):
        """Has a number that is read once."""

        start: float = fixed(3)

    assert Once(Basic()).settings() == {"start": 3.0}
    assert Once(Basic()).state_dict() == {}
