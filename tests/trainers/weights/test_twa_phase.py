"""The phase in which TWA trains: after it, come what may, the run is as before it."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
from plain import assert_weights, mean_of, run_of, sgd
from torch import nn

from dgavg import Trainer, fit, trainer
from dgavg.models import Model
from dgavg.seeding import random_state
from dgavg.testing import check_link, toy_run
from dgavg.testing.contract import same
from dgavg.trainer import state
from dgavg.trainers.weights.twa import TWA

ACTING = {"start": 0.3, "steps": 4}  # the ends of epochs at steps 4, 8 and 12


class Counting(nn.Module):
    """A buffer that no state dict has, moved by every forward pass in training."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1), persistent=False)

    def forward(self, x):
        if self.training:
            self.seen += x.mean().detach()
        return x


def noisy_model():
    """Batch norm, dropout, a part in evaluation mode, a hidden buffer."""
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), Counting()]
    model = Model(nn.Sequential(*layers), nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3))).train()
    model.classifier[0].eval()
    return model


@trainer("probing")
class Probing(Trainer):
    """Trains a module of its own beside the model, and notes at which steps it is asked."""

    fails_at: int = 1000
    clears_at: int = 1000
    asked: list[int] = state(list)

    def module(self, run):
        return nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3))

    def loss(self, run, batch):
        self.asked.append(run.t)
        if run.t == self.clears_at:
            run.reset_optimizer()
            run.optimizer.state["new"] = {"moment": torch.ones(1)}
        if run.t == self.fails_at:
            run.model.eval()
            raise KeyboardInterrupt
        out = self.inner.loss(run, batch)
        out.terms["probing"] = F.cross_entropy(run.extras["probing"](out.features), batch.y)
        return out


def all_of(run):
    """Everything of a run but the links' states."""
    found = {k: v for k, v in run.state_dict().items() if k not in ("links", "trainer", "closed")}
    found["modes"] = [m.training for m in run.model.modules()]
    found["gradients"] = [p.grad is None for p in run.parameters]
    found["slopes"] = [p.grad for p in run.parameters if p.grad is not None]
    found["random"] = random_state()
    found["losses"] = run.losses.read()
    return found


def noisy_run(spec, settings, optimizer=sgd):
    torch.manual_seed(3)
    return run_of(spec, settings, model=noisy_model(), optimizer=optimizer)


class Zeroing(torch.optim.SGD):
    """Fills gradients with zeros in place."""

    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none=False)


OPTIMIZERS = {
    "zeroing": lambda p: Zeroing(p, lr=0.05),
    "sgd": sgd,
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "rest", ["basic", "probing_sam_basic", "irm_mixup_basic", "ema_vrex_basic"]
)
def test_the_run_is_left_alone_to_the_bit(rest, optimizer):
    found = []
    for spec in (f"twa_{rest}", rest):
        settings = {"twa": ACTING} if "twa" in spec else {}
        penalties = {"irm": {"anneal": 5, "weight": 1.0}, "vrex": {"anneal": 5}}
        settings |= {k: v for k, v in penalties.items() if k in rest}
        run = noisy_run(spec, settings, OPTIMIZERS[optimizer])
        fit(run)
        found.append(all_of(run))
    for part, mine in found[0].items():
        assert same(mine, found[1][part]), part


def test_the_phase_counts_on_from_the_last_step():
    run = toy_run("twa_probing_basic", {"twa": ACTING})
    fit(run)
    assert list(run.trainer)[1].asked == [*range(12), 12, 13, 14, 15]
    assert run.t == 12


@pytest.mark.parametrize(("steps", "number"), [(0.5, 6), (0.01, 1), (0, 0), (3, 3), (20, 20)])
def test_its_length_is_a_share_of_the_run_or_a_number(steps, number):
    run = toy_run("twa_probing_basic", {"twa": {**ACTING, "steps": steps}})
    fit(run)
    assert list(run.trainer)[1].asked == list(range(12 + number))


@pytest.mark.parametrize("what", ["fails_at", "clears_at"])
def test_an_exception_in_the_phase_leaves_the_run_alone_too(what):
    settings = {"twa": ACTING, "probing": {what: 14}}
    run = noisy_run("twa_probing_basic", settings)
    if what == "fails_at":
        with pytest.raises(KeyboardInterrupt):
            fit(run)
        mean = mean_of(run.trainer.average.weights(row) for row in torch.eye(3))
        weights = run.candidates()[TWA.name].weights
        mine = {k: v for k, v in weights.items() if k not in run.buffer_names}
        assert_weights(mine, {k: mean[k].double() for k in mine}, rtol=1e-5, atol=1e-6)
        assert run.trainer.coefficients == []
    else:
        fit(run)
    other = noisy_run("probing_basic", {})
    fit(other)
    mine, theirs = all_of(run), all_of(other)
    for part in mine.keys() - {"scores"}:
        assert same(mine[part], theirs[part]), part
    if what == "fails_at":  # once more: the phase starts anew
        list(run.trainer)[1].fails_at = 1000
        fit(run)
        straight = noisy_run("twa_probing_basic", {"twa": ACTING})
        fit(straight)
        assert run.trainer.coefficients == straight.trainer.coefficients


def test_the_phase_done_twice_is_the_same_phase():
    """As after an exception in the phase of another link."""
    run = noisy_run("twa_basic", {"twa": ACTING})
    fit(run)
    first = run.trainer.coefficients
    run.tap("after_fit")
    assert run.trainer.coefficients == first


def saved(run):
    file = io.BytesIO()
    torch.save(run.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("rest", ["basic", "sam_mixup_basic"])
def test_a_run_goes_on_from_any_evaluation_as_if_never_stopped(rest):
    """With dropout: a run killed in the phase has the checkpoint of the last step's evaluation."""
    settings, states = {"twa": ACTING}, {}
    whole = run_of(f"twa_{rest}", settings, model=noisy_model(), eval_every=3)

    def note(run):
        states[run.t, run.closed] = saved(run)

    fit(whole, after_eval=note)
    assert {(12, False), (12, True)} <= states.keys()
    for when, checkpoint in states.items():
        torch.manual_seed(99)
        again = run_of(f"twa_{rest}", settings, model=noisy_model(), eval_every=3)
        again.load_state_dict(checkpoint)
        fit(again)
        assert again.trainer.coefficients == whole.trainer.coefficients, when
        for part, mine in whole.state_dict().items():
            assert same(mine, again.state_dict()[part]), (when, part)


def test_the_contract_holds():
    check_link("twa", **ACTING)
    check_link("twa", **ACTING, centred=False, momentum=0.9, weight_decay=0.1, batchnorm="average")
