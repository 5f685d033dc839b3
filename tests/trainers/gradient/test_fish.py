"""Fish against a walk on a deep copy in float64, written back in part."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from plain import assert_weights, domains_of, run_of, sgd, trained
from torch import nn

from dgavg import Trainer, UserError, chain, fit, trainer
from dgavg.testing import ToyBatches, toy_model
from dgavg.testing.contract import same


def order_at(t):
    run = run_of("basic")
    run.t = t
    return run.random("fish").permutation(3).tolist()


def walked(meta_lr, steps=12):
    """One optimizer for the whole run; its model walks, then goes part of the way."""
    model, batches = toy_model().double(), ToyBatches()
    optimizer = sgd(model.parameters())
    for t in range(steps):
        before, batch = copy.deepcopy(model.state_dict()), batches(t)
        rows = domains_of(batch)
        for i in order_at(t):
            optimizer.zero_grad()
            F.cross_entropy(model(batch.x[rows[i]].double()), batch.y[rows[i]]).backward()
            optimizer.step()
        with torch.no_grad():
            for name, value in model.state_dict().items():
                if value.is_floating_point():
                    value.copy_(before[name] + meta_lr * (value - before[name]))
    return model


@pytest.mark.parametrize("meta_lr", [0.05, 0.5, 1.0])
def test_training_walks_and_goes_part_of_the_way(meta_lr):
    run = trained("fish_basic", {"fish": {"meta_lr": meta_lr}})
    assert_weights(run.live, walked(meta_lr).state_dict(), rtol=1e-3, atol=1e-4)
    assert run.live["featurizer.2.num_batches_tracked"].item() == 36


def test_the_order_of_domains_changes():
    assert len({str(order_at(t)) for t in range(50)}) == 6


def test_the_whole_way_is_training_on_one_domain_at_a_time_to_the_bit():
    run, plain = trained("fish_basic", {"fish": {"meta_lr": 1.0}}), run_of("basic")
    for t in range(12):
        parts = plain.batches(t).split()
        for i in order_at(t):
            plain.step(parts[i])
        plain.t += 1
    assert same(run.live, plain.live)
    assert same(run.optimizer.state_dict(), plain.optimizer.state_dict())


def test_inner_steps_are_at_the_learning_rate_of_the_step():
    run = run_of("fish_basic", schedule=lambda t: 0.5**t)
    rates = []
    run.optimizer.register_step_post_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    fit(run)
    assert rates == [0.1 * 0.5 ** (t // 3) for t in range(36)]


@trainer("neighbour")
class Neighbour(Trainer):
    """Trains a layer with batch norm beside the model."""

    def module(self, run):
        return nn.Sequential(nn.Linear(8, 2), nn.BatchNorm1d(2))

    def loss(self, run, batch):
        out = self.inner.loss(run, batch)
        out.terms["neighbour"] = run.extras["neighbour"](out.features).square().sum()
        return out


def test_modules_beside_the_model_go_the_same_part_of_the_way():
    found = []
    for meta_lr in (1.0, 0.25):
        run = run_of("fish_neighbour_basic", {"fish": {"meta_lr": meta_lr}})
        with torch.no_grad():
            for p in run.extras.parameters():
                p.fill_(0.3)
        before = {k: v.clone() for k, v in run.extras.state_dict().items()}
        run.step(run.batches(0))
        found.append({k: v - before[k] for k, v in run.extras.state_dict().items()})
    for name, whole in found[0].items():
        part = whole if name.endswith("tracked") else 0.25 * whole
        torch.testing.assert_close(found[1][name], part)
        assert whole.any() or name == "neighbour.0.bias"


def test_tied_weights_go_one_part_of_the_way():
    model = toy_model()
    model.tied = model.classifier
    run = run_of("fish_basic", model=model)
    plain = run_of("fish_basic")
    for each in (run, plain):
        fit(each)
    assert all(run.live[k].equal(v) for k, v in plain.live.items())


def test_the_loss_it_reports_has_the_risks_of_all_domains_in_order():
    settings = {"irm": {"anneal": 0, "weight": 2.0}}
    run = run_of("fish_irm_basic", settings, optimizer=lambda p: torch.optim.SGD(p, lr=1e-12))
    batch = run.batches(0)
    found = run.step(batch)
    plain = run_of("irm_basic", settings)
    losses = [plain.loss(part) for part in batch.split()]
    torch.testing.assert_close(found.risks, torch.cat([k.risks for k in losses]))
    torch.testing.assert_close(found.terms["irm"], sum(k.terms["irm"] for k in losses) / 3)
    torch.testing.assert_close(found.total, sum(k.total for k in losses) / 3)
    assert found.logits.shape == (24, 3)
    assert found.batch.x is batch.x
    assert (found.batch.y.equal(batch.y), found.batch.d.equal(batch.d)) == (True, True)
    assert not found.total.requires_grad


def test_weights_are_logged_by_domain():
    run = run_of("fish_basic")
    fit(run)
    assert set(run.losses.read()) == {"total", *(f"risk/domain{i}" for i in range(3))}


@pytest.mark.parametrize("value", [0.0, -0.5, 1.5])
def test_a_part_of_the_way_outside_0_to_1_is_refused(value):
    with pytest.raises(UserError, match=rf"trainer.fish.meta_lr={value}: a number in \(0, 1\]"):
        chain("fish_basic", fish={"meta_lr": value})


def test_a_single_domain_is_no_walk():
    with pytest.raises(UserError, match="'fish' needs at least 2 training domains, here is 1"):
        run_of("fish_basic", domains=1)


@pytest.mark.parametrize("other", ["coral", "andmask"])
def test_links_that_compare_domains_are_refused_beside_fish(other):
    with pytest.raises(UserError, match="feeds it one at a time"):
        chain(f"fish_{other}_basic")
