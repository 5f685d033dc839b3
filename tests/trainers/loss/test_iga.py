"""IGA against DomainBed's loop over domains, differentiated twice in float64."""

from __future__ import annotations

import pytest
import torch
from plain import assert_weights, forward, mean, plain_training, risks_of, run_of, trained
from torch import nn

from dgavg import UserError, chain
from dgavg.testing import toy_model
from dgavg.trainers.loss.iga import penalty


def domainbed_penalty(model, risks):
    """`IGA.update` of DomainBed: the mean gradient without a graph."""
    parameters = list(model.parameters())
    grads = [torch.autograd.grad(r, parameters, create_graph=True) for r in risks]
    means = torch.autograd.grad(mean(risks), parameters, retain_graph=True)
    return sum((g - m).pow(2).sum() for own in grads for g, m in zip(own, means, strict=True))


@pytest.mark.parametrize("weight", [1.0, 10.0])
def test_training_adds_the_weighted_spread_of_the_gradients(weight):
    def loss(model, batch, t):
        _, logits = forward(model, batch)
        risks = risks_of(logits, batch)
        return mean(risks) + weight * domainbed_penalty(model, risks)

    run = trained("iga_basic", {"iga": {"weight": weight}}, steps=6)
    model = plain_training(loss, steps=6)
    assert_weights(run.live, model.state_dict(), rtol=1e-3, atol=1e-4)
    basic = trained("basic", steps=6).live["classifier.weight"]
    assert (run.live["classifier.weight"] - basic).abs().max() > 1e-3


def test_the_penalty_and_its_gradient_are_domainbeds():
    model, batch = toy_model().double(), run_of("basic").batches(0)
    risks = risks_of(forward(model, batch)[1], batch)
    parameters = list(model.parameters())
    grads = [torch.autograd.grad(r, parameters, create_graph=True) for r in risks]
    found, expected = penalty(grads), domainbed_penalty(model, risks)
    torch.testing.assert_close(found, expected)
    slopes = [torch.autograd.grad(v, parameters, retain_graph=True) for v in (found, expected)]
    for mine, theirs in zip(*slopes, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_fixed_gradients_give_the_sum_over_domains_of_squared_distances():
    grads = [
        [torch.tensor([1.0, 0.0]), None, torch.tensor([[2.0]])],
        [torch.tensor([3.0, 4.0]), None, torch.tensor([[0.0]])],
    ]
    assert penalty(grads).item() == 2 * (1 + 4) + 2 * 1


def test_each_domains_own_gradient_holds_the_penalty():
    """Beside a link that takes the gradient of one domain after the other."""
    found = []
    for spec in ("iga_basic", "iga_andmask_basic", "andmask_iga_basic"):
        names = spec.split("_")
        settings = {"iga": {"weight": 3.0}, "andmask": {"tau": 0.0}}
        run = run_of(spec, {k: v for k, v in settings.items() if k in names})
        run.grad(run.batches(0))
        found.append(torch.cat([p.grad.flatten() for p in run.parameters]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert found[1].equal(found[2])


def test_the_penalty_of_float16_is_in_plain_units():
    found = []
    for precision in ("fp32", "fp16"):
        run = run_of("iga_basic", {"iga": {"weight": 3.0}}, precision=precision)
        if precision == "fp16":
            run.update.scale = 2.0**6  # the second derivative overflows sooner
        out = run.grad(run.batches(0))
        slope = torch.cat([p.grad.flatten() for p in run.parameters])
        found.append((out.terms["iga"].item(), slope))
    assert found[0][0] == pytest.approx(found[1][0], rel=0.02)
    assert (found[0][1] - found[1][1]).norm() < 0.02 * found[0][1].norm()


def test_a_parameter_that_no_risk_reaches_is_left_out():
    model = toy_model()
    model.spare = nn.Parameter(torch.ones(2))
    run = run_of("iga_basic", {"iga": {"weight": 3.0}}, model=model)
    run.step(run.batches(0))
    assert model.spare.tolist() == [1.0, 1.0]


def test_a_weight_of_0_is_basic():
    off = trained("iga_basic", {"iga": {"weight": 0.0}}).live
    for name, value in trained("basic").live.items():
        torch.testing.assert_close(off[name], value, rtol=1e-4, atol=1e-5)


def test_statistics_move_as_in_one_pass():
    run, basic = run_of("iga_basic"), run_of("basic")
    for each in (run, basic):
        each.grad(each.batches(0))
    assert all(run.live[k].equal(basic.live[k]) for k in run.buffer_names)


def test_a_negative_weight_of_iga_is_refused():
    with pytest.raises(UserError, match=r"trainer.iga.weight=-1.0: a finite number from 0 on"):
        chain("iga_basic", iga={"weight": -1})


def test_a_single_domain_has_nothing_to_align():
    with pytest.raises(UserError, match="'iga' needs at least 2 training domains, here is 1"):
        run_of("iga_basic", domains=1)
