"""DANN and CDANN against DomainBed's two losses, each for its own side, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from plain import assert_weights, forward, run_of, sgd, trained
from torch import nn

from dgavg import UserError, chain, fit
from dgavg.testing import ToyBatches, check_link, toy_model
from dgavg.testing.contract import same
from dgavg.trainers.model import cdann, dann  # noqa: F401  (they register themselves)

BOTH = pytest.mark.parametrize("name", ["dann", "cdann"])


def losses(net, features, batch, name, penalty):
    """The discriminator's loss as DomainBed's `AbstractDANN.update` has it, row by row."""
    read, rows, classes = features, [], 3
    if name == "cdann":
        soft_labels = batch.y.is_floating_point()
        shares = batch.y if soft_labels else [[float(k == y) for k in range(3)] for y in batch.y]
        vectors = [sum(share[k] * net.embedding[k] for k in range(3)) for share in shares]
        read = features + torch.stack(vectors)
    out = net.layers[4](torch.relu(net.layers[2](torch.relu(net.layers[0](read)))))
    total = 0.0
    for i, d in enumerate(batch.d):
        error = -out[i].log_softmax(dim=0)[d]
        if name == "dann":
            weight = 1 / len(batch.d)
        elif batch.y.is_floating_point():
            counts = batch.y.sum(dim=0)
            weight = sum(batch.y[i, k] / counts[k] for k in range(classes)) / classes
        else:
            weight = 1 / ((batch.y == batch.y[i]).sum().item() * classes)
        total = total + weight * error
        rows.append(error)
    if penalty:
        slope = torch.autograd.grad(sum(rows), read, create_graph=True)[0]
        total = total + penalty * sum((s**2).sum() for s in slope) / len(slope)
    return total


def double_net(run, name):
    return copy.deepcopy(run.extras[name]).double()


def soft(batch):
    random = torch.Generator().manual_seed(3)
    batch.y = torch.rand(len(batch.d), 3, generator=random).softmax(dim=1)
    return batch


@BOTH
@pytest.mark.parametrize("labels", ["hard", "soft"])
@pytest.mark.parametrize("penalty", [0.0, 0.7])
def test_each_side_has_its_own_gradient_of_one_loss(name, labels, penalty):
    settings = {"weight": 0.3, "grad_penalty": penalty}
    run = run_of(f"{name}_basic", {name: settings})
    run.model.double(), run.extras.double()
    run.forward = lambda x, model=None: wide(run, x)
    batch = run.batches(0)
    batch.x = batch.x.double()
    if labels == "soft":
        batch = soft(batch)
        batch.y = batch.y.double()
    found = run.grad(batch)
    mine = [p.grad.clone() for p in run.parameters]

    model, net = copy.deepcopy(run.model), double_net(run, name)
    features = model.featurizer(batch.x)
    errors = F.cross_entropy(model.classifier(features), batch.y)
    against = losses(net, features, batch, name, penalty)
    theirs = [
        *torch.autograd.grad(errors - 0.3 * against, list(model.parameters()), retain_graph=True),
        *torch.autograd.grad(against, list(net.parameters())),
    ]
    torch.testing.assert_close(found.terms[name], against, rtol=1e-6, atol=1e-9)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def wide(run, x):
    """`run.forward` without its float32."""
    features = run.model.featurizer(x)
    return features, run.model.classifier(features)


def plain(run, name, weight, *, d_steps=0, factor=1.0, steps=12):
    """DomainBed's alternation, or both sides at once, by SGD with momentum."""
    model, net, batches = toy_model().double(), double_net(run, name), ToyBatches()
    mine, theirs = sgd(model.parameters()), sgd(net.parameters())
    for group in theirs.param_groups:
        group["lr"] *= factor
    for t in range(steps):
        batch = batches(t)
        features, logits = forward(model, batch)
        errors = erm_of(logits, batch)
        against = losses(net, features, batch, name, 0)
        alone = d_steps and t % (d_steps + 1) < d_steps
        both, mine_only = errors - weight * against, list(model.parameters())
        one = torch.autograd.grad(both, mine_only, retain_graph=True)
        two = torch.autograd.grad(against, list(net.parameters()))
        if not alone:
            set_and_step(mine, model, one)
        if not d_steps or alone:
            set_and_step(theirs, net, two)
    return model, net


def erm_of(logits, batch):
    return F.cross_entropy(logits, batch.y)


def set_and_step(optimizer, module, gradients):
    for parameter, gradient in zip(module.parameters(), gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()


@BOTH
@pytest.mark.parametrize(("d_steps", "factor"), [(0, 1.0), (0, 3.0), (1, 1.0), (2, 0.5)])
def test_training_is_that_of_two_optimizers(name, d_steps, factor):
    settings = {"weight": 0.4, "d_steps": d_steps, "lr_factor": factor}
    run = run_of(f"{name}_basic", {name: settings})
    model, net = plain(run, name, 0.4, d_steps=d_steps, factor=factor)
    fit(run)
    assert_weights(run.live, model.state_dict())
    assert_weights(dict(run.extras[name].state_dict()), net.state_dict())
    moved = trained("basic").live["featurizer.1.weight"] - run.live["featurizer.1.weight"]
    assert moved.abs().max() > 1e-3


def test_who_rests_keeps_its_moments():
    """Adam counts the steps of each side alone."""
    adam = {"optimizer": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1)}
    run = run_of("dann_basic", {"dann": {"d_steps": 2}}, **adam)
    own = next(run.extras["dann"].parameters())
    for t in range(6):
        before = [p.clone() for p in (own, run.model.classifier.weight)]
        run.step(run.batches(t))
        run.t += 1
        stood = [
            p.equal(b) for p, b in zip((own, run.model.classifier.weight), before, strict=True)
        ]
        assert stood == [t % 3 == 2, t % 3 != 2]
    assert run.optimizer.state[own]["step"] == 4
    assert run.optimizer.state[run.model.classifier.weight]["step"] == 2


def test_turns_stand_below_every_gradient_link():
    run = run_of("sam_dann_basic", {"sam": {"rho": 0.3}, "dann": {"d_steps": 1}})
    weights = [v for k, v in run.model.named_parameters() if k.endswith("weight")]
    before = [v.clone() for v in weights]
    run.step(run.batches(0))
    assert all(v.equal(b) for v, b in zip(weights, before, strict=True))
    run.t = 1
    run.step(run.batches(1))
    assert not any(v.equal(b) for v, b in zip(weights, before, strict=True))


@BOTH
@pytest.mark.parametrize("rows", [1, 8])
def test_weight_0_is_basic_and_the_discriminator_still_learns(name, rows):
    run = run_of(f"{name}_basic", {name: {"weight": 0.0}}, rows=rows)
    before = next(run.extras[name].parameters()).clone()
    fit(run)
    expected = trained("basic", rows=rows).live
    for key, tensor in run.live.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=1e-6)
    assert not next(run.extras[name].parameters()).equal(before)


@BOTH
def test_a_discriminator_draws_from_its_own_seed_alone(name):
    found = []
    for seed, outside in ((0, 1), (0, 2), (5, 1)):
        torch.manual_seed(outside)
        run = run_of(f"{name}_basic", seed=seed)
        found.append((run.extras.state_dict(), torch.rand(2)))
    assert same(found[0][0], found[1][0])
    assert not same(found[0][0], found[2][0])
    torch.manual_seed(1)
    assert torch.rand(2).equal(found[0][1])


def test_the_discriminator_is_domainbeds_network():
    run = run_of("dann_basic", domains=4)
    shapes = [tuple(p.shape) for p in run.extras["dann"].parameters()]
    assert shapes == [(256, 8), (256,), (256, 256), (256,), (4, 256), (4,)]
    kinds = [type(m) for m in run.extras["dann"].layers]
    assert kinds == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    assert run_of("cdann_basic", domains=4).extras["cdann"].embedding.shape == (3, 8)


def test_finding_the_width_leaves_modes_and_statistics_alone():
    model = toy_model()
    model.featurizer[2].eval()
    modes, before = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    run_of("dann_basic", model=model)
    assert [m.training for m in model.modules()] == modes
    assert same(model.state_dict(), before)


@BOTH
def test_the_features_of_the_domains_come_closer(name):
    """The share of the features' variance that lies between domains, on domains that are moved."""
    between = {}
    for weight in (0.0, 3.0):
        run = run_of(f"{name}_basic", {name: {"weight": weight}}, steps=200, rows=32)
        fit(run)
        batch = run.batches(999)
        features = batch.by_domain(run.forward(batch.x)[0].detach())
        spread = features.mean(dim=1).var(dim=0).sum() / features.flatten(0, 1).var(dim=0).sum()
        between[weight] = spread.item()
    assert between[3.0] < 0.9 * between[0.0]


@BOTH
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1.0}, "weight=-1.0: a finite number from 0 on"),
        ({"grad_penalty": -1.0}, "grad_penalty=-1.0: a number from 0 on"),
        ({"d_steps": -1}, "d_steps=-1: a number of steps, or 0"),
        ({"lr_factor": 0}, "lr_factor=0.0: a number above 0"),
    ],
)
def test_settings_out_of_range_are_refused(name, settings, message):
    with pytest.raises(UserError, match=f"trainer.{name}.{message}"):
        chain(f"{name}_basic", **{name: settings})


@BOTH
def test_a_single_domain_is_refused(name):
    with pytest.raises(UserError, match=f"'{name}' needs at least 2 training domains, here is 1"):
        run_of(f"{name}_basic", domains=1)


@BOTH
@pytest.mark.parametrize("d_steps", [0, 1])
def test_the_contract(name, d_steps):
    check_link(name, weight=5.0, grad_penalty=0.1, d_steps=d_steps)


def test_a_class_that_the_batch_lacks_leaves_its_share_out():
    labels = F.one_hot(torch.tensor([0, 0, 2]), 3).double()
    torch.testing.assert_close(cdann.balanced(labels), torch.tensor([1 / 6, 1 / 6, 1 / 3]).double())
