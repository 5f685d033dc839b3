"""The loop: order of events, early ends, exceptions that name their link."""

from __future__ import annotations

import math

import pytest
import torch

from dgavg import Candidate, Trainer, fit, state, trainer
from dgavg.fit import FLUSH
from dgavg.losslog import LossLog, NonFiniteLossError
from dgavg.testing import toy_run
from dgavg.testing.contract import check_resume


@pytest.fixture
def events():
    seen = []

    @trainer("watch")
    class Watch(Trainer):
        """Notes when each tap comes."""

        def setup(self, run):
            seen.append("setup")

        def after_step(self, run):
            seen.append(f"step {run.t}")

        def after_epoch(self, run):
            seen.append(f"epoch {run.t}")

        def after_eval(self, run, scores):
            seen.append(f"eval {run.t}")

        def after_fit(self, run):
            seen.append(f"fit {run.t}")

    return seen


def test_events_come_in_order(events):
    fit(toy_run("watch_basic", steps=7))  # 4 steps an epoch, evaluated every 3 and at the end
    assert events == [
        "setup", "step 1", "step 2", "step 3", "eval 3", "step 4", "epoch 4", "step 5", "step 6",
        "eval 6", "step 7", "eval 7", "fit 7", "eval 7",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("first", "evaluated"), [(None, [3, 6, 7]), (1, [1, 4, 7]), (5, [5, 7]), (9, [7])]
)
def test_the_first_evaluation_may_come_earlier_or_later(events, first, evaluated):
    run = toy_run("watch_basic", steps=7)
    run.first_eval = 3 if first is None else first
    fit(run)
    found = [int(e.split()[1]) for e in events if e.startswith("eval")]
    assert found[:-1] == evaluated  # the last is that of the phase after the fit


def test_stopping_ends_the_loop_and_the_last_phase_still_runs(events):
    run = toy_run("watch_basic")
    run.stopping = lambda scores: "enough" if len(scores) == 2 else ""
    fit(run)
    assert (run.t, run.stop) == (6, "enough")
    assert events[-3:] == ["eval 6", "fit 6", "eval 6"]


def test_a_phase_after_the_last_step_runs_once_also_after_a_resume(events):
    run = toy_run("watch_basic", steps=4)
    fit(run)
    again = toy_run("watch_basic", steps=4)
    again.load_state_dict(run.state_dict())
    events.clear()
    fit(again)
    assert events == []
    assert len(again.scores) == 3  # at 3, at 4, after the phase


def test_a_candidate_of_the_last_phase_is_scored():
    @trainer("late")
    class Late(Trainer):
        """Offers weights only after the last step."""

        weights: dict = state(dict)

        def after_fit(self, run):
            self.weights = {k: v.clone() for k, v in run.live.items()}

        def candidates(self):
            return {"late": Candidate(self.weights)} if self.weights else {}

    run = toy_run("late_basic")
    fit(run)
    assert ["late" in s for s in run.scores] == [False, False, False, False, True]
    assert run.scores[-1]["late"] == run.scores[-1]["live"]


def test_an_exception_names_its_place_in_the_chain():
    @trainer("breaks")
    class Breaks(Trainer):
        """Raises in its loss."""

        def loss(self, run, batch):
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom") as caught:
        fit(toy_run("ema_breaks_coral_basic"))
    assert caught.value.__notes__ == ["in trainer chain ema > [breaks] > coral > basic"]


def poisoned(at):
    @trainer("poison")
    class Poison(Trainer):
        """Adds a term that is not finite at one step."""

        def loss(self, run, batch):
            out = self.inner.loss(run, batch)
            out.terms["poison"] = out.logits.mean() * (math.nan if run.t == at else 0.0)
            return out

    return toy_run("poison_basic")


def test_a_loss_that_is_not_finite_names_step_and_term():
    with pytest.raises(NonFiniteLossError, match="step 4: the term 'poison' is nan; try a lower"):
        fit(poisoned(at=4))


def test_losses_are_looked_at_long_before_a_late_evaluation():
    run = poisoned(at=4)
    run.steps = run.eval_every = 1000
    with pytest.raises(NonFiniteLossError, match="step 4"):
        fit(run)
    assert run.t == FLUSH


def test_a_loss_that_is_not_finite_names_the_domain():
    run = toy_run("basic")
    batches = run.batches

    class Poisoned:
        names, classes, epoch_length = batches.names, batches.classes, batches.epoch_length

        def __call__(self, t):
            batch = batches(t)
            if t == 5:
                batch.x = torch.where((batch.d == 1).view(-1, 1, 1, 1), math.inf, batch.x)
            return batch

    run.batches = Poisoned()
    run.model.eval()  # batch norm would spread it to every domain
    with pytest.raises(NonFiniteLossError, match="step 5: the loss of domain 'domain1' is nan"):
        fit(run)


def test_mean_losses_are_those_of_the_steps_since_the_last_reading():
    run, log = toy_run("coral_basic"), LossLog(["a", "b", "c"])
    written = []
    for t in range(5):
        loss = run.loss(run.batches(t))
        log.write(loss)
        written.append([loss.total.item(), *loss.risks.tolist(), loss.terms["coral"].item()])
    log.flush(5)
    means = log.read()
    assert list(means) == ["total", "risk/a", "risk/b", "risk/c", "term/coral"]
    expected = [sum(column) / 5 for column in zip(*written, strict=True)]
    assert list(means.values()) == pytest.approx(expected)
    assert log.last == pytest.approx(written[-1][0])
    assert log.read() == {}


def test_the_total_is_the_weighted_risks_and_all_terms():
    run = toy_run("irm_coral_basic", {"irm": {"anneal": 0}})
    loss = run.loss(run.batches(0))
    assert set(loss.terms) == {"irm", "coral"}
    plain = loss.risks.mean() + loss.terms["irm"] + loss.terms["coral"]
    assert loss.total.item() == pytest.approx(plain.item())


def test_early_stopping_and_loss_sums_survive_a_resume():
    check_resume("ma_ema_irm_basic", {"irm": {"anneal": 5}}, steps=(2, 5, 8))


def test_a_term_may_be_a_plain_number():
    run, log = toy_run("basic"), LossLog(["a", "b", "c"])
    loss = run.loss(run.batches(0))
    loss.terms["constant"] = 0.5
    log.write(loss)
    log.flush(1)
    assert log.read()["term/constant"] == 0.5
