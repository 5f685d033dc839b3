"""Fishr against one autograd call a row, as DomainBed's code computes it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from plain import (
    assert_weights,
    domains_of,
    forward,
    mean,
    plain_training,
    risks_of,
    run_of,
    trained,
)
from torch import nn

from dgavg import Trainer, UserError, chain, fit, trainer
from dgavg.models import Model
from dgavg.testing import ToyBatches, check_link, toy_model, toy_run
from dgavg.trainers.loss.fishr import Fishr, slopes, spread, variances

EMA = 0.8


def row_gradients(layer, features, y):
    """The gradient of each row's loss in the layer's parameters, by autograd: (N, entries)."""
    found = []
    for row, label in zip(features, y, strict=True):
        loss = F.cross_entropy(layer(row[None]), label[None])
        parts = torch.autograd.grad(loss, list(layer.parameters()), create_graph=True)
        found.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(found)


class Domainbed:
    """`compute_fishr_penalty` of DomainBed, its moving averages kept from call to call."""

    def __init__(self, ema):
        self.ema, self.kept = ema, None

    def __call__(self, layer, features, batch):
        found = []
        for rows in domains_of(batch):
            gradients = row_gradients(layer, features[rows], batch.y[rows])
            found.append((gradients - gradients.mean(0)).pow(2).mean(0))
        kept = self.kept or [torch.zeros_like(v) for v in found]
        moved = [self.ema * k + (1 - self.ema) * v for k, v in zip(kept, found, strict=True)]
        self.kept = [m.detach() for m in moved]
        corrected = [m / (1 - self.ema) for m in moved]
        centre = mean(corrected)
        return mean([(c - centre).pow(2).mean() for c in corrected])


def random_rows(soft):
    random = torch.Generator().manual_seed(1)
    features = torch.randn(15, 4, generator=random, dtype=torch.float64).requires_grad_()
    y = torch.randint(3, (15,), generator=random)
    if soft:
        y = torch.rand(15, 3, generator=random, dtype=torch.float64).softmax(dim=1)
    return features, y


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_penalty_and_its_gradient_are_domainbeds(bias, soft):
    features, y = random_rows(soft)
    layer = nn.Linear(4, 3, bias=bias).double()
    batch = ToyBatches(3, 5)(0)
    batch.y = y
    expected = Domainbed(0.0)(layer, features, batch)
    given = F.pad(features, (0, 1), value=1.0) if bias else features
    by_row = slopes(layer(features), y)
    found = spread(variances(batch.by_domain(given), batch.by_domain(by_row)))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    inputs = [features, *layer.parameters()]
    for a, b in zip(*(torch.autograd.grad(v, inputs) for v in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_the_penalty_of_four_rows_by_hand():
    """Two classes, one feature, zero weights: softmax 1/2, so a row's gradient is ±φ/2, ±1/2."""
    features = [[1.0, 3.0], [2.0, 2.0]]  # by domain
    labels = [[0, 0], [0, 1]]
    found = []
    for row, label in zip(features, labels, strict=True):
        signs = [-0.5 if k == 0 else 0.5 for k in label]  # slope in the logit of class 0
        gradients = [[s * f, s, -s * f, -s] for s, f in zip(signs, row, strict=True)]
        centre = [sum(g) / 2 for g in zip(*gradients, strict=True)]
        pairs = zip(zip(*gradients, strict=True), centre, strict=True)
        found.append([sum((x - c) ** 2 for x in g) / 2 for g, c in pairs])
    assert found == [[0.25, 0.0, 0.25, 0.0], [1.0, 0.25, 1.0, 0.25]]
    expected = sum(((a - b) / 2) ** 2 for a, b in zip(*found, strict=True)) / 4
    phi = torch.tensor([[[f, 1.0] for f in row] for row in features])
    by_row = slopes(torch.zeros(4, 2), torch.tensor(labels).flatten()).view(2, 2, 2)
    assert spread(variances(phi, by_row)).item() == pytest.approx(expected, abs=1e-7)
    assert expected == pytest.approx(0.078125)


@pytest.mark.parametrize("anneal", [0, 5])
def test_training_adds_nothing_before_anneal_but_the_sums_grow(anneal):
    penalty = Domainbed(EMA)

    def loss(model, batch, t):
        features, logits = forward(model, batch)
        weight = 20.0 if t >= anneal else 0.0
        return mean(risks_of(logits, batch)) + weight * penalty(model.classifier, features, batch)

    run = trained("fishr_basic", {"fishr": {"weight": 20.0, "anneal": anneal, "ema": EMA}})
    assert_weights(run.live, plain_training(loss, renew_at=anneal).state_dict())
    kept = torch.stack(penalty.kept) / (1 - EMA)
    weight, bias = kept.split([24, 3], dim=1)
    expected = torch.cat([weight.view(3, 3, 8), bias.view(3, 3, 1)], dim=2)
    torch.testing.assert_close(run.trainer.sums.double(), expected, rtol=1e-4, atol=1e-5)


def deep_model():
    plain = toy_model()
    head = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), plain.classifier)
    nn.init.eye_(head[0].weight)
    nn.init.zeros_(head[0].bias)
    return Model(plain.featurizer, head)


def test_of_a_classifier_that_ends_in_a_linear_layer_that_layer_counts():
    run = run_of("fishr_basic", {"fishr": {"weight": 1.0, "anneal": 0}}, model=deep_model())
    batch = run.batches(0)
    found = run.loss(batch).terms["fishr"]
    model = deep_model().double()
    features = model.classifier[:-1](model.featurizer(batch.x.double()))
    expected = Domainbed(0.0)(model.classifier[-1], features, batch)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-7)
    assert not run.model.classifier[-1]._forward_hooks, "the hook is gone again"


@trainer("twice")
class Twice(Trainer):
    """Gives the classifier half the features, after the whole; `keeps` what they gave."""

    keeps: bool = True

    def loss(self, run, batch):
        out = self.inner.loss(run, batch)
        features = 0.5 * out.features
        with run.autocast():
            logits = run.model.classifier(features).float()
        if self.keeps:
            return replace(out, features=features, logits=logits)
        return replace(out, terms={"twice": logits.mean()})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("keeps", [False, True])
def test_where_a_link_calls_the_classifier_again_features_are_those_of_the_logits(keeps, precision):
    settings = {"fishr": {"weight": 1.0, "anneal": 0}, "twice": {"keeps": keeps}}
    run = run_of("fishr_twice_basic", settings, precision=precision)
    batch = run.batches(0)
    out = run.loss(batch)
    model = toy_model().double()
    features = model.featurizer(batch.x.double()) * (0.5 if keeps else 1.0)
    expected = Domainbed(0.0)(model.classifier, features, batch)
    near = {"rtol": 1e-4, "atol": 1e-7} if precision == "fp32" else {"rtol": 0.1, "atol": 1e-6}
    torch.testing.assert_close(out.terms["fishr"].double(), expected, **near)


def test_without_gradients_the_penalty_is_the_same():
    run = run_of("fishr_basic", {"fishr": {"weight": 1.0, "anneal": 0}}, precision="bf16")
    batch = run.batches(0)
    with torch.no_grad():
        found = run.loss(batch).terms["fishr"]
    torch.testing.assert_close(found, run.loss(batch).terms["fishr"].detach())


class Head(nn.Module):
    """A linear layer behind something without weights, and `scale` times what it gives."""

    def __init__(self, scale):
        super().__init__()
        self.linear, self.scale = toy_model().classifier, scale

    def forward(self, features):
        logits = self.linear(features.square())
        return logits if self.scale == 1 else self.scale * logits


def test_a_classifier_of_ones_own_counts_by_its_linear_layer():
    given = Model(toy_model().featurizer, Head(1))
    run = run_of("fishr_basic", {"fishr": {"weight": 1.0, "anneal": 0}}, model=given)
    batch = run.batches(0)
    found = run.loss(batch).terms["fishr"]
    model = toy_model().double()
    features = model.featurizer(batch.x.double()).square()
    expected = Domainbed(0.0)(model.classifier, features, batch)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-7)


def test_logits_that_no_linear_layer_gave_are_refused():
    given = Model(toy_model().featurizer, Head(2))
    run = run_of("fishr_basic", {"fishr": {"anneal": 0}}, model=given)
    with pytest.raises(UserError, match="fishr: the logits are not what the classifier's last lin"):
        run.loss(run.batches(0))


def test_a_classifier_without_a_bias_has_no_column_for_it():
    plain = toy_model()
    model = Model(plain.featurizer, nn.Linear(8, 3, bias=False))
    run = run_of("fishr_basic", {"fishr": {"anneal": 0}}, model=model)
    fit(run)
    assert run.trainer.sums.shape == (3, 3, 8)


@pytest.mark.parametrize("head", [nn.Sequential(), nn.Sequential(nn.Linear(8, 3), nn.Tanh())])
def test_a_classifier_that_is_not_linear_is_refused(head):
    with pytest.raises(
        UserError, match=r"fishr needs a linear classifier, here is Sequential: mak"
    ):
        run_of("fishr_basic", {"fishr": {"anneal": 0}}, model=Model(toy_model().featurizer, head))


def test_a_step_of_two_passes_adds_the_variances_of_the_first():
    found = []
    for rho in (0.0, 0.5):
        settings = {"fishr": {"weight": 0, "anneal": 0}, "sam": {"rho": rho}}
        run = toy_run("fishr_sam_basic", settings)
        run.step(run.batches(0))
        run.t += 1
        run.tap("after_step")
        found.append(run.trainer.sums.clone())
    assert torch.equal(*found)
    assert found[0].sum() > 0


def test_a_second_derivative_exists():
    run = run_of("fishr_basic", {"fishr": {"anneal": 0}})
    term = run.loss(run.batches(0)).terms["fishr"]
    first = torch.autograd.grad(term, run.parameters, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), run.parameters)
    assert all(g.isfinite().all() for g in second)


def test_weight_0_is_basic():
    found, basic = trained("fishr_basic", {"fishr": {"weight": 0, "anneal": 0}}), trained("basic")
    for name, tensor in found.live.items():
        torch.testing.assert_close(tensor, basic.live[name], rtol=1e-4, atol=1e-5)


def test_soft_labels_train():
    fit(toy_run("fishr_mixup_basic", {"fishr": {"anneal": 3}}))


def test_defaults_are_domainbeds():
    assert Fishr(chain("basic")).settings() == {"weight": 1000.0, "anneal": 1500, "ema": 0.95}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("weight", -1, r"weight=-1\.0: a finite number from 0 on"),
        ("anneal", -1, r"anneal=-1\.0: a number from 0 on"),
        ("ema", 1, r"ema=1\.0: from 0 up to below 1"),
        ("ema", -0.1, r"ema=-0\.1: from 0 up to below 1"),
    ],
)
def test_settings_out_of_range_are_refused(key, value, message):
    with pytest.raises(UserError, match=rf"trainer\.fishr\.{message}"):
        chain("fishr_basic", fishr={key: value})


def test_a_weight_that_would_never_act_is_refused():
    with pytest.raises(UserError, match=r"trainer\.fishr\.anneal=1500 is past the end"):
        toy_run("fishr_basic")


def test_one_image_of_a_domain_and_a_single_domain_are_refused():
    with pytest.raises(UserError, match="fishr needs at least 2 images of each domain a batch"):
        run_of("fishr_basic", {"fishr": {"anneal": 0}}, rows=1)
    with pytest.raises(UserError, match="'fishr' needs at least 2 training domains, here is 1"):
        run_of("fishr_basic", {"fishr": {"anneal": 0}}, domains=1)


def test_the_contract():
    check_link("fishr", weight=1000.0, anneal=3)
