"""SAM against two explicit gradients on a deep copy."""

from __future__ import annotations

import copy

import pytest
import torch
from plain import assert_weights, erm, plain_training, run_of, trained
from torch import nn

from dgavg import Trainer, UserError, chain, fit, trainer
from dgavg.testing import toy_model


def sam_gradient(rho):
    """Leaves SAM's gradient in `.grad`; batch-norm statistics move by the pass at w alone."""

    def gradient(model, batch, t):
        twin = copy.deepcopy(model)
        erm(model, batch, t).backward()
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        with torch.no_grad():
            for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
                mine += rho * theirs.grad / norm
        twin.zero_grad()
        erm(twin, batch, t).backward()
        for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
            theirs.grad = mine.grad

    return gradient


def test_training_steps_with_the_gradient_at_the_worst_point_nearby():
    run = trained("sam_basic", {"sam": {"rho": 0.3}})
    model = plain_training(gradient=sam_gradient(0.3))
    assert_weights(run.live, model.state_dict())
    basic = trained("basic").live["classifier.weight"]
    assert (run.live["classifier.weight"] - basic).abs().max() > 1e-3


def bits(run):
    return {k: v.clone() for k, v in run.live.items()}


def same(one, other):
    return all(v.equal(other[k]) for k, v in one.items())


def test_taking_the_gradient_puts_the_weights_back_to_the_bit():
    run = run_of("sam_basic", {"sam": {"rho": 0.3}})
    before = {k: v.clone() for k, v in run.model.named_parameters()}
    places = {k: v.data_ptr() for k, v in run.live.items()}
    run.grad(run.batches(0))
    assert all(v.equal(before[k]) for k, v in run.model.named_parameters())
    assert {k: v.data_ptr() for k, v in run.model.state_dict().items()} == places


def test_batch_norm_statistics_are_those_of_the_first_pass():
    run, basic = run_of("sam_basic", {"sam": {"rho": 5.0}}), run_of("basic")
    for each in (run, basic):
        each.grad(each.batches(0))
    for name in run.buffer_names:
        assert run.live[name].equal(basic.live[name]), name
    assert run.model.featurizer[2].track_running_stats


def test_statistics_of_a_module_beside_the_model_are_those_of_the_first_pass_too():
    @trainer("beside")
    class Beside(Trainer):
        """Sends the features through a module of its own."""

        def module(self, run):
            return nn.BatchNorm1d(8)

        def loss(self, run, batch):
            out = self.inner.loss(run, batch)
            out.terms["beside"] = run.extras["beside"](out.features).square().mean()
            return out

    found = []
    for spec in ("beside_basic", "beside_sam_basic"):
        run = run_of(spec)
        run.grad(run.batches(0))
        found.append(run.extras["beside"].state_dict())
    assert same(*found)
    assert found[1]["num_batches_tracked"].item() == 1


def test_frozen_batch_norm_stays_frozen():
    model = toy_model()
    model.featurizer[2].eval()
    run = run_of("sam_basic", {"sam": {"rho": 0.5}}, model=model)
    before = {k: run.live[k].clone() for k in run.buffer_names}
    fit(run)
    assert all(run.live[k].equal(v) for k, v in before.items())
    assert not model.featurizer[2].training
    assert model.featurizer[2].track_running_stats


def dropout_model():
    model = toy_model()
    model.featurizer.append(nn.Dropout(0.5))
    return model.train()


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.Adam(p, lr=1e-2),
    ],
)
def test_a_radius_of_0_is_basic_to_the_bit_dropout_included(optimizer):
    found = []
    for spec, settings in (("basic", {}), ("sam_basic", {"sam": {"rho": 0}})):
        torch.manual_seed(0)
        found.append(trained(spec, settings, model=dropout_model(), optimizer=optimizer).live)
    assert same(*found)


def test_a_radius_too_small_to_move_a_weight_is_basic_to_the_bit():
    assert same(bits(trained("sam_basic", {"sam": {"rho": 1e-30}})), trained("basic").live)


def test_the_loss_it_reports_is_that_at_the_weights():
    run, basic = run_of("sam_basic", {"sam": {"rho": 2.0}}), run_of("basic")
    batch = run.batches(0)
    assert run.grad(batch).total.item() == basic.grad(batch).total.item()


def test_parameters_without_a_gradient_stay_where_they_are():
    model = toy_model()
    model.spare = nn.Parameter(torch.ones(2))
    run = run_of("sam_basic", model=model)
    fit(run)
    assert model.spare.tolist() == [1.0, 1.0]


def test_an_exception_in_the_second_pass_leaves_weights_and_batch_norm_as_before():
    run = run_of("sam_basic", {"sam": {"rho": 1.0}})
    passes = []

    def fuse(module, inputs):
        passes.append(1)
        if len(passes) == 2:
            raise RuntimeError("second pass")

    run.model.classifier.register_forward_pre_hook(fuse)
    before = {k: v.clone() for k, v in run.model.named_parameters()}
    with pytest.raises(RuntimeError, match="second pass"):
        run.grad(run.batches(0))
    assert all(v.equal(before[k]) for k, v in run.model.named_parameters())
    assert run.model.featurizer[2].track_running_stats


def test_a_negative_radius_is_refused():
    with pytest.raises(UserError, match=r"sam.rho=-0.1: a number from 0 on"):
        chain("sam_basic", sam={"rho": -0.1})
