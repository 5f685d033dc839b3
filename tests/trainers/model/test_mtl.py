"""MTL against a loop over domains that keeps the embeddings by hand, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from plain import STEPS, assert_weights, mean, run_of, sgd, trained
from torch import nn

from dgavg import UserError, chain, fit
from dgavg.models import Model
from dgavg.seeding import random_state
from dgavg.testing import ToyBatches, check_link, toy_model
from dgavg.testing.contract import same
from dgavg.trainers.model.mtl import DomainHead


class Plain:
    """The model by hand: featurizer, a classifier twice as wide, embeddings of the domains."""

    def __init__(self, ema):
        self.model, self.ema = toy_model().double(), ema
        head = self.model.classifier
        self.weight = torch.cat([head.weight.detach(), torch.zeros(3, 8).double()], dim=1)
        self.weight.requires_grad_()
        self.bias, self.kept = head.bias, [torch.zeros(8).double() for _ in range(3)]

    def parameters(self):
        return [*self.model.featurizer.parameters(), self.weight, self.bias]

    def loss(self, batch, keep=True):
        features, y = self.model.featurizer(batch.x.double()), batch.y
        risks = []
        for d in range(3):
            rows = [i for i in range(len(batch.d)) if batch.d[i] == d]
            embedding = self.ema * mean([features[i] for i in rows]) + (1 - self.ema) * self.kept[d]
            if keep:
                self.kept[d] = embedding.detach()
            read = torch.stack([torch.cat([features[i], embedding]) for i in rows])
            risks.append(F.cross_entropy(read @ self.weight.T + self.bias, y[rows]))
        return mean(risks)

    def state(self):
        found = {k: v for k, v in self.model.state_dict().items() if k.startswith("featurizer")}
        found |= {"classifier.linear.weight": self.weight, "classifier.linear.bias": self.bias}
        return found | {"classifier.embeddings": torch.stack(self.kept)}


@pytest.mark.parametrize("ema", [0.3, 0.99, 1.0])
def test_training_reads_and_keeps_each_domains_mean(ema):
    run = run_of("mtl_basic", {"mtl": {"ema": ema}})
    fit(run)
    plain, batches = Plain(ema), ToyBatches()
    optimizer = sgd(plain.parameters())
    for t in range(STEPS):
        optimizer.zero_grad()
        plain.loss(batches(t)).backward()
        optimizer.step()
    assert_weights({k: run.live[k] for k in plain.state()}, plain.state())
    assert (run.live["classifier.linear.weight"][:, 8:]).abs().max() > 0.01
    assert run.live["classifier.linear.weight"].shape == (3, 16)


def test_gradients_flow_through_the_mean():
    plain = Plain(0.7)
    with torch.no_grad():
        plain.weight += torch.randn(3, 16, generator=torch.Generator().manual_seed(0)).double()
    head = DomainHead(nn.Linear(8, 3).double(), 3)
    head.ema = 0.7
    with torch.no_grad():
        head.linear.weight.copy_(plain.weight)
        head.linear.bias.copy_(plain.bias)
        head.embeddings.copy_(torch.randn(3, 8, generator=torch.Generator().manual_seed(1)))
    plain.kept = list(head.embeddings)
    batch = ToyBatches()(0)
    batch.y = F.one_hot(batch.y, 3).double() * 0.8 + 0.2 / 3
    loss = plain.loss(batch, keep=False)
    features = plain.model.featurizer(batch.x.double())
    mine = F.cross_entropy(head(features), batch.y)
    torch.testing.assert_close(mine, loss, rtol=1e-9, atol=1e-12)
    body = list(plain.model.featurizer.parameters())
    for a, b in zip(torch.autograd.grad(mine, body), torch.autograd.grad(loss, body), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12)


def test_the_model_starts_as_it_was():
    found, basic = (run_of(spec).loss(ToyBatches()(0)) for spec in ("mtl_basic", "basic"))
    torch.testing.assert_close(found.logits, basic.logits)


def test_at_evaluation_the_mean_of_all_training_domains_stands_in():
    run = trained("mtl_basic")
    model, x = run.model.eval(), run.batches(50).x
    features, head = model.featurizer(x), model.classifier
    middle = mean(list(head.embeddings))
    expected = torch.stack([head.linear(torch.cat([row, middle])) for row in features])
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model(x[:1]), expected[:1])  # of its image alone


def test_a_setting_that_follows_a_schedule_counts_in_the_pass_and_in_the_tap():
    curve = {"step": {"values": [1.0, 0.25], "at": [3]}}
    run = run_of("mtl_basic", {"mtl": {"ema": curve}})
    for t in range(4):
        before = run.live["classifier.embeddings"].clone()
        features = copy.deepcopy(run.model).featurizer(run.batches(t).x)
        now = run.batches(t).by_domain(features).mean(dim=1)
        run.step(run.batches(t))
        run.t += 1
        run.tap("after_step")
        share = 0.25 if t == 3 else 1.0
        expected = share * now + (1 - share) * before
        torch.testing.assert_close(run.live["classifier.embeddings"], expected.detach())
        assert run.model.classifier.ema == share


def test_the_means_of_a_step_are_those_of_its_first_pass():
    run, basic = (
        run_of(spec, {"sam": {"rho": 2.0}} if "sam" in spec else {})
        for spec in ("mtl_sam_basic", "mtl_basic")
    )
    for each in (run, basic):
        each.step(each.batches(0))
        each.t += 1
        each.tap("after_step")
    assert run.live["classifier.embeddings"].equal(basic.live["classifier.embeddings"])


def test_a_pass_leaves_the_embeddings_alone_and_the_tap_lets_go_of_the_means():
    run = run_of("mtl_basic")
    run.grad(run.batches(0))
    assert run.live["classifier.embeddings"].abs().max() == 0
    assert not run.trainer.noted.value.requires_grad
    run.tap("after_step")
    assert run.live["classifier.embeddings"].abs().max() > 0
    assert run.trainer.noted.value is None


def test_means_of_an_earlier_step_that_was_given_up_are_forgotten():
    run = run_of("mtl_basic")
    run.grad(run.batches(0))
    run.t = 1
    run.grad(run.batches(1))
    features = run.forward(run.batches(1).x)[0].detach()
    means = run.trainer.noted.take()
    torch.testing.assert_close(means, run.batches(1).by_domain(features).mean(dim=1))


def test_averages_hold_embeddings_too():
    run = trained("ema_mtl_basic", {"ema": {"decay": 0.5}})
    kept = run.candidates()["ema"].weights
    assert kept["classifier.embeddings"].shape == (3, 8)


def test_no_random_number_is_drawn():
    before = random_state()
    model = toy_model()
    chain("mtl_basic").adapt(model, 3)
    assert same(before["torch"], random_state()["torch"])


def test_a_classifier_without_bias_and_of_other_sizes():
    model = Model(nn.Flatten(), nn.Linear(5, 7, bias=False))
    chain("mtl_basic").adapt(model, 2)
    assert model(torch.randn(6, 5)).shape == (6, 7)
    assert model.classifier.linear.bias is None
    assert model.classifier.embeddings.shape == (2, 5)


def test_a_classifier_that_is_not_linear_is_refused():
    model = toy_model()
    model.classifier = nn.Sequential(model.classifier)
    with pytest.raises(UserError, match="a classifier that is one linear layer, not Sequential"):
        run_of("mtl_basic", model=model)


def test_a_single_domain_is_refused():
    with pytest.raises(UserError, match="'mtl' needs at least 2 training domains, here is 1"):
        run_of("mtl_basic", domains=1)


@pytest.mark.parametrize("ema", [0.0, 1.5])
def test_an_ema_out_of_range_is_refused(ema):
    with pytest.raises(UserError, match=f"trainer.mtl.ema={ema}: above 0, at most 1"):
        chain("mtl_basic", mtl={"ema": ema})


def test_the_contract():
    check_link("mtl", ema=0.5)
