"""LPFT against a loop that trains the classifier alone, then all."""

from __future__ import annotations

import copy

import pytest
import torch
from plain import STEPS, assert_weights, erm, run_of, sgd, trained
from torch import nn

from dgavg import Trainer, UserError, chain, fit, trainer
from dgavg.testing import ToyBatches, check_link, toy_model
from dgavg.testing.contract import same


def plain(probe, *, freeze_bn=True, reset=False):
    """Two phases of SGD with momentum: the classifier's momentum goes on unless reset."""
    model, batches = toy_model().double(), ToyBatches()
    heads = sgd(model.classifier.parameters())
    body = sgd(model.featurizer.parameters())
    for t in range(STEPS):
        if reset and t == probe:
            heads = sgd(model.classifier.parameters())
        model.featurizer[2].train(not (freeze_bn and t < probe))
        model.zero_grad()
        erm(model, batches(t), t).backward()
        heads.step()
        if t >= probe:
            body.step()
    return model


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("freeze_bn", [False, True])
@pytest.mark.parametrize("probe", [1, 5, 11])
def test_training_is_in_two_phases(probe, freeze_bn, reset):
    settings = {"probe": probe, "freeze_bn": freeze_bn, "reset": reset}
    run = trained("lpft_basic", {"lpft": settings})
    assert_weights(run.live, plain(probe, freeze_bn=freeze_bn, reset=reset).state_dict())


def test_a_share_of_the_run():
    half, six = ({"lpft": {"probe": probe}} for probe in (0.5, 6))
    assert same(trained("lpft_basic", half).live, trained("lpft_basic", six).live)


def test_0_is_basic_to_the_bit():
    settings = {"probe": 0, "reset": True}
    assert same(trained("lpft_basic", {"lpft": settings}).live, trained("basic").live)


@pytest.mark.parametrize("freeze_bn", [False, True])
def test_what_rests_stays_to_the_bit_under_weight_decay(freeze_bn):
    run = run_of(
        "lpft_basic",
        {"lpft": {"probe": 6, "freeze_bn": freeze_bn}},
        optimizer=lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
    )
    before = {k: v.clone() for k, v in run.live.items()}
    for t in range(6):
        run.step(run.batches(t))
        run.t += 1
    moved = {k for k, v in run.live.items() if not v.equal(before[k])}
    heads = {"classifier.weight", "classifier.bias"}
    assert moved == (heads if freeze_bn else heads | run.buffer_names)
    assert all(m.training for m in run.model.modules())


def test_batch_norm_that_was_frozen_stays_frozen():
    model = toy_model()
    model.featurizer[2].eval()
    run = run_of("lpft_basic", {"lpft": {"probe": 6}}, model=model)
    fit(run)
    assert not model.featurizer[2].training
    assert model.featurizer.training


def test_an_exception_leaves_the_modes_as_before():
    @trainer("fails")
    class Fails(Trainer):
        """Fails."""

        def loss(self, run, batch):
            raise RuntimeError("no loss")

    run = run_of("lpft_fails_basic", {"lpft": {"probe": 6}})
    with pytest.raises(RuntimeError, match="no loss"):
        run.grad(run.batches(0))
    assert all(m.training for m in run.model.modules())


def test_modules_beside_the_model_go_on():
    @trainer("beside")
    class Beside(Trainer):
        """Trains a module of its own on the features."""

        def module(self, run):
            return nn.Linear(8, 1)

        def loss(self, run, batch):
            out = self.inner.loss(run, batch)
            out.terms["beside"] = run.extras["beside"](out.features).square().mean()
            return out

    run = run_of("lpft_beside_basic", {"lpft": {"probe": 6}})
    before = copy.deepcopy(run.extras.state_dict())
    run.step(run.batches(0))
    assert not same(dict(run.extras.state_dict()), dict(before))


def test_parameters_outside_both_parts_rest_too():
    model = toy_model()
    model.scale = nn.Parameter(torch.ones(()))
    model.classifier.register_forward_hook(lambda m, i, out: out * model.scale)
    run = run_of("lpft_basic", {"lpft": {"probe": 6}}, model=model)
    run.step(run.batches(0))
    assert model.scale.item() == 1.0
    run.t = 6
    run.step(run.batches(6))
    assert model.scale.item() != 1.0


def test_sam_outside_moves_the_classifier_alone():
    run = run_of("sam_lpft_basic", {"sam": {"rho": 0.5}, "lpft": {"probe": 6}})
    seen = []
    run.model.featurizer.register_forward_hook(
        lambda m, i, out: seen.append(m[1].weight.detach().clone())
    )
    run.step(run.batches(0))
    assert len(seen) == 2
    assert seen[0].equal(seen[1])


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        (-1, r"trainer.lpft.probe=-1.0: a number from 0 on"),
        (12, "past the end: the run has 12 steps"),
        (2.5, "a whole step, or below 1"),
    ],
)
def test_settings_out_of_range_are_refused(probe, message):
    with pytest.raises(UserError, match=message):
        run_of("lpft_basic", {"lpft": {"probe": probe}})


def test_probe_takes_no_schedule():
    with pytest.raises(UserError, match="takes a number, no schedule"):
        chain("lpft_basic", lpft={"probe": lambda t: 1.0})


@pytest.mark.parametrize("freeze_bn", [False, True])
def test_the_contract(freeze_bn):
    check_link("lpft", probe=6, freeze_bn=freeze_bn, reset=True)
