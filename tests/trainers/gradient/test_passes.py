"""Each domain's gradient against autograd by hand in float64; what passes leave as it was."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from plain import forward, risks_of, run_of
from torch import nn

from dgavg import Trainer, trainer
from dgavg.testing import toy_model
from dgavg.trainers.gradient.passes import (
    domain_gradients,
    moved,
    put_back,
    statistics_kept,
)


@trainer("pull")
class Pull(Trainer):
    """Adds the mean squared logit."""

    def loss(self, run, batch):
        out = self.inner.loss(run, batch)
        out.terms["pull"] = 0.3 * out.logits.square().mean()
        return out


@trainer("uneven")
class Uneven(Trainer):
    """Weighs domain d by d + 1, in shares."""

    def loss(self, run, batch):
        out = self.inner.loss(run, batch)
        share = torch.arange(1.0, batch.domains + 1)
        out.weights = out.weights * share / share.sum() * batch.domains
        return out


@trainer("asked")
class Asked(Trainer):
    """Has a gradient of its own: that of the links below."""

    def grad(self, run, batch):
        return self.inner.grad(run, batch)


@trainer("drops")
class Drops(Trainer):
    """Takes the gradient of the last parameter away from every domain but the first."""

    def grad(self, run, batch):
        out = self.inner.grad(run, batch)
        if batch.weights[0] == 0:
            run.parameters[-1].grad = None
        return out


def found_in(spec, weights=None, settings=None, **options):
    run = run_of(spec, settings, **options)
    batch = replace(run.batches(0), weights=weights)
    return run, domain_gradients(run.trainer, run, batch)


def losses_of(model, batch, weights, pull):
    """D times each domain's weighted risk, plus the term."""
    _, logits = forward(model, batch)
    terms = 0.3 * logits.square().mean() if pull else 0.0
    return [3 * w * r + terms for w, r in zip(weights, risks_of(logits, batch), strict=True)]


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def by_hand(weights, pull):
    model, batch = toy_model().double(), run_of("basic").batches(0)
    parameters = list(model.parameters())
    losses = losses_of(model, batch, weights, pull)
    return torch.stack(
        [flat(torch.autograd.grad(v, parameters, retain_graph=True)) for v in losses]
    )


THIRD = [1 / 3] * 3
CASES = [
    ("basic", None, THIRD, False),
    ("pull_basic", None, THIRD, True),
    ("uneven_pull_basic", None, [1 / 6, 2 / 6, 3 / 6], True),
    ("pull_basic", [0.5, 0.2, 0.3], [0.5, 0.2, 0.3], True),
    ("basic", [0.0, 1.0, 0.0], [0.0, 1.0, 0.0], False),
    ("uneven_basic", [0.5, 0.2, 0.3], [0.25, 0.2, 0.45], False),
]


@pytest.mark.parametrize("path", ["andmask", "andmask_asked"])
@pytest.mark.parametrize(("spec", "given", "weights", "pull"), CASES)
def test_a_row_is_the_gradient_of_a_domains_weighted_risk_and_all_terms(
    path, spec, given, weights, pull
):
    run, found = found_in(f"{path}_{spec}", None if given is None else torch.tensor(given))
    expected = by_hand(weights, pull)
    torch.testing.assert_close(found.rows.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.loss.weights, torch.tensor(weights))
    found.write(found.rows.mean(dim=0))
    mine = flat([p.grad for p in run.parameters])
    whole = run_of(spec)
    whole.grad(replace(whole.batches(0), weights=None if given is None else torch.tensor(given)))
    torch.testing.assert_close(mine, flat([p.grad for p in whole.parameters]))


def test_with_sam_further_in_a_row_is_sams_gradient_of_one_domain():
    _, found = found_in("andmask_pull_sam_basic", settings={"sam": {"rho": 0.5}})
    batch = run_of("basic").batches(0)
    for d, row in enumerate(by_hand(THIRD, True)):
        twin = toy_model().double()
        with torch.no_grad():
            step = 0.5 * row / row.norm()
            for p, part in zip(
                twin.parameters(), step.split([p.numel() for p in twin.parameters()]), strict=True
            ):
                p += part.view_as(p)
        loss = losses_of(twin, batch, THIRD, True)[d]
        expected = flat(torch.autograd.grad(loss, list(twin.parameters())))
        torch.testing.assert_close(found.rows[d].double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("spec", ["andmask_basic", "andmask_asked_basic"])
def test_weights_that_the_batch_came_with_count(spec):
    run, basic = run_of(spec), run_of("basic")
    batch = replace(run.batches(0), weights=torch.tensor([0.5, 0.3, 0.2]))
    rows = domain_gradients(run.trainer, run, batch).rows
    basic.grad(batch)
    expected = torch.cat([p.grad.flatten() for p in basic.parameters])
    torch.testing.assert_close(rows.mean(dim=0), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("spec", ["andmask_basic", "andmask_asked_basic", "andmask_sam_basic"])
def test_running_statistics_move_as_in_one_pass(spec):
    run, basic = found_in(spec)[0], run_of("basic")
    basic.grad(basic.batches(0))
    for name in run.buffer_names:
        assert run.live[name].equal(basic.live[name]), name
    assert run.model.featurizer[2].track_running_stats


@pytest.mark.parametrize("spec", ["andmask_pull_basic", "andmask_asked_pull_basic"])
def test_the_loss_it_gives_is_that_of_the_batch(spec):
    run, found = found_in(spec)
    whole = run_of("pull_basic")
    expected = whole.loss(run.batches(0))
    torch.testing.assert_close(found.loss.total, expected.total)
    assert found.loss.risks.equal(expected.risks)
    assert found.loss.terms["pull"].equal(expected.terms["pull"])


@pytest.mark.parametrize("spec", ["andmask_basic", "andmask_asked_basic"])
def test_a_parameter_that_no_domain_reaches_has_no_gradient(spec):
    model = toy_model()
    model.spare = nn.Parameter(torch.ones(2))
    run, found = found_in(spec, model=model)
    model.spare.grad = torch.ones(2)
    found.write(found.rows.mean(dim=0))
    assert model.spare.grad is None
    assert all(p.grad is not None for p in run.parameters if p is not model.spare)


def test_a_domain_that_does_not_reach_a_parameter_has_zeros_there():
    _, found = found_in("andmask_drops_basic")
    parts = [found.split(row)[-1] for row in found.rows]
    assert parts[0].abs().max() > 0
    assert not torch.stack(parts[1:]).any()
    assert all(found.reached)


def test_a_parameter_frozen_later_has_no_gradient():
    run = run_of("andmask_basic")
    run.model.classifier.bias.requires_grad_(False)
    run.grad(run.batches(0))
    assert run.model.classifier.bias.grad is None
    assert run.model.classifier.weight.grad is not None


def test_gradients_are_views_of_the_shapes_of_the_parameters():
    run, found = found_in("andmask_basic")
    for part, p in zip(found.split(found.rows[0]), run.parameters, strict=True):
        assert part.shape == p.shape
        assert part.untyped_storage().data_ptr() == found.rows.untyped_storage().data_ptr()


def test_tensors_are_put_back_to_the_bit_after_an_exception():
    tensors = [torch.randn(3), torch.randn(2, 2)]
    copies = [t.clone() for t in tensors]

    def fail():
        with put_back(tensors) as before:
            assert all(b.equal(c) for b, c in zip(before, copies, strict=True))
            for t in tensors:
                t.mul_(1e20)
            raise RuntimeError("in the block")

    with pytest.raises(RuntimeError, match="in the block"):
        fail()
    assert all(t.equal(c) for t, c in zip(tensors, copies, strict=True))


def norms():
    layers = [
        nn.BatchNorm1d(4),
        nn.BatchNorm1d(4, momentum=None),
        nn.BatchNorm1d(4, track_running_stats=False),
        nn.BatchNorm1d(4).eval(),
        nn.InstanceNorm1d(4, track_running_stats=True),
        nn.InstanceNorm1d(4, track_running_stats=True).eval(),
        nn.InstanceNorm1d(4),
    ]
    return nn.Sequential(*layers)


class Holder:
    """What `statistics_kept` looks at in a run."""

    def __init__(self, model):
        self.model, self.extras = model, nn.ModuleDict()


@pytest.mark.parametrize("nested", [False, True])
def test_passes_give_the_same_outputs_but_leave_every_statistic(nested):
    model, x = norms(), torch.randn(8, 4, 3)
    model(x)
    twin = copy.deepcopy(model)
    with statistics_kept(Holder(model)):
        if nested:
            with statistics_kept(Holder(model)):
                model(x)
        found = model(2 * x)
    assert found.equal(copy.deepcopy(twin)(2 * x))
    state = twin.state_dict()
    assert all(v.equal(state[k]) for k, v in model.state_dict().items())
    settings = [(m.track_running_stats, m.momentum, m.training) for m in model]
    assert settings == [(m.track_running_stats, m.momentum, m.training) for m in twin]


def test_layers_keep_statistics_again_after_an_exception():
    model = norms()
    with pytest.raises(RuntimeError, match="in the block"), statistics_kept(Holder(model)):
        raise RuntimeError("in the block")
    assert [m.track_running_stats for m in model] == [m.track_running_stats for m in norms()]
    assert [m.momentum for m in model] == [m.momentum for m in norms()]


def test_moved_weights_move_by_as_much_and_come_back():
    run = run_of("basic")
    weights = run.parameters[:2]
    before = [w.detach().clone() for w in weights]
    with moved(run, weights, [torch.ones_like(w) for w in weights]):
        assert all(w.equal(b + 1) for w, b in zip(weights, before, strict=True))
        assert not run.model.featurizer[2].track_running_stats
    assert all(w.equal(b) for w, b in zip(weights, before, strict=True))
    assert run.model.featurizer[2].track_running_stats
