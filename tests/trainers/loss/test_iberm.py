"""IB-ERM and IB-IRM against DomainBed's loop over domains."""

from __future__ import annotations

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
    sgd,
    trained,
)

from dgavg import UserError, chain, fit
from dgavg.testing import ToyBatches, check_link, toy_model, toy_run
from dgavg.trainers.loss.iberm import IBERM, penalty
from dgavg.trainers.loss.ibirm import IBIRM

BOTH = pytest.mark.parametrize("name", ["iberm", "ibirm"])


def bottleneck(features, batch):
    """The mean over domains and features of the variance, written out."""
    found = []
    for rows in domains_of(batch):
        part = features[rows]
        squares = sum((row - part.mean(0)) ** 2 for row in part)
        found.append((squares / (len(part) - 1)).mean())
    return mean(found)


def irm_penalty(logits, y):
    scale = torch.ones((), dtype=logits.dtype).requires_grad_()
    slopes = [
        torch.autograd.grad(
            F.cross_entropy(logits[i::2] * scale, y[i::2]), scale, create_graph=True
        )
        for i in (0, 1)
    ]
    return slopes[0][0] * slopes[1][0]


@pytest.mark.parametrize("rows", [2, 5])
def test_the_variance_and_its_gradient_are_the_plain_ones(rows):
    batch = ToyBatches(3, rows)(0)
    features = (batch.x.flatten(1).double() ** 2).requires_grad_()
    found, expected = penalty(batch.by_domain(features)), bottleneck(features, batch)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    slopes = [torch.autograd.grad(value, features)[0] for value in (found, expected)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("anneal", [0, 5, 11])
def test_iberm_adds_nothing_before_anneal_and_resets_the_optimizer_there(anneal):
    def loss(model, batch, t):
        features, logits = forward(model, batch)
        weight = 3.0 if t >= anneal else 0.0
        return mean(risks_of(logits, batch)) + weight * bottleneck(features, batch)

    run = trained("iberm_basic", {"iberm": {"weight": 3.0, "anneal": anneal}})
    assert_weights(run.live, plain_training(loss, renew_at=anneal).state_dict())


def plain_ibirm(ib, irm):
    """DomainBed's loop, its optimizer made anew at both steps."""
    model, batches = toy_model().double(), ToyBatches()
    optimizer = sgd(model.parameters())
    for t in range(12):
        if t in (ib, irm):
            optimizer = sgd(model.parameters())
        batch = batches(t)
        features, logits = forward(model, batch)
        invariance = mean([irm_penalty(logits[r], batch.y[r]) for r in domains_of(batch)])
        loss = mean(risks_of(logits, batch)) + (5.0 if t >= irm else 1.0) * invariance
        loss = loss + (3.0 if t >= ib else 0.0) * bottleneck(features, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize(("ib", "irm"), [(0, 0), (3, 7), (7, 3), (5, 5)])
def test_ibirm_adds_both_and_resets_the_optimizer_at_each_step(ib, irm):
    settings = {"weight": 3.0, "anneal": ib, "irm_weight": 5.0, "irm_anneal": irm}
    run = trained("ibirm_basic", {"ibirm": settings})
    assert_weights(run.live, plain_ibirm(ib, irm))


@pytest.mark.parametrize(
    ("name", "off"), [("iberm", {}), ("ibirm", {"irm_weight": 0, "irm_anneal": 0})]
)
def test_weight_0_is_basic(name, off):
    found = trained(f"{name}_basic", {name: {"weight": 0, "anneal": 0, **off}})
    basic = trained("basic")
    for key, tensor in found.live.items():
        torch.testing.assert_close(tensor, basic.live[key], rtol=1e-4, atol=1e-5)


def test_soft_labels_and_one_domain_train():
    for name, settings in (("iberm", {"anneal": 2}), ("ibirm", {"anneal": 2, "irm_anneal": 3})):
        fit(toy_run(f"{name}_mixup_basic", {name: settings}))
        fit(toy_run(f"{name}_basic", {name: settings}, domains=1))


def test_defaults_are_domainbeds():
    own = {"weight": 100.0, "anneal": 500}
    assert IBERM(chain("basic")).settings() == own
    assert IBIRM(chain("basic")).settings() == {**own, "irm_weight": 100.0, "irm_anneal": 500}


@BOTH
@pytest.mark.parametrize("key", ["weight", "anneal", "irm_weight", "irm_anneal"])
def test_settings_below_0_are_refused(name, key):
    if name == "iberm" and key.startswith("irm"):
        return
    with pytest.raises(UserError, match=rf"^trainer\.{name}\.{key}=-1\.0: a .*number from 0 on"):
        chain(f"{name}_basic", **{name: {key: -1}})


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_an_infinite_weight_of_irm_is_refused(weight):
    with pytest.raises(UserError, match=r"trainer\.ibirm\.irm_weight=.*: a finite number"):
        chain("ibirm_basic", ibirm={"irm_weight": weight})


@BOTH
def test_a_weight_that_would_never_act_is_refused(name):
    with pytest.raises(UserError, match=rf"trainer\.{name}\.anneal=500 is past the end"):
        toy_run(f"{name}_basic")
    if name == "ibirm":
        with pytest.raises(UserError, match=r"trainer\.ibirm\.irm_anneal=500 is past the end"):
            toy_run("ibirm_basic", {"ibirm": {"anneal": 0}})


@BOTH
def test_one_image_of_a_domain_is_refused(name):
    off = {"iberm": {"anneal": 0}, "ibirm": {"anneal": 0, "irm_anneal": 0}}[name]
    with pytest.raises(UserError, match=f"{name} needs at least 2 images of each domain a batch"):
        run_of(f"{name}_basic", {name: off}, rows=1)


def test_the_contract():
    check_link("iberm", weight=100.0, anneal=3)
    check_link("ibirm", weight=100.0, anneal=3, irm_weight=1000.0, irm_anneal=5)
