"""GroupDRO against DomainBed's loop over domains."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from plain import assert_weights, forward, plain_training, risks_of, run_of, trained

from dgavg import UserError, chain, fit
from dgavg.testing import check_link, toy_run
from dgavg.testing.contract import same
from dgavg.trainers.loss.groupdro import GroupDRO

ETA = 0.5


def domainbed(eta):
    """The loss, its q kept between calls, multiplied and divided as the reference does."""
    q = torch.ones(3, dtype=torch.float64)

    def loss(model, batch, t):
        _, logits = forward(model, batch)
        risks = risks_of(logits, batch)
        for d, risk in enumerate(risks):
            q[d] *= (eta * risk.detach()).exp()
        q.div_(q.sum())
        return sum(weight.clone() * risk for weight, risk in zip(q, risks, strict=True))

    return loss, q


def test_training_weighs_by_the_q_of_this_step():
    loss, q = domainbed(ETA)
    run = trained("groupdro_basic", {"groupdro": {"eta": ETA}})
    assert_weights(run.live, plain_training(loss).state_dict())
    torch.testing.assert_close(run.trainer.log_q.exp().double(), q, rtol=1e-5, atol=1e-6)
    assert q.max() > 0.35, "q moved"


def test_q_starts_even_and_the_first_step_moves_it_already():
    run = run_of("groupdro_basic", {"groupdro": {"eta": 2.0}})
    out = run.loss(run.batches(0))
    expected = [math.exp(2.0 * risk) for risk in out.risks.tolist()]
    expected = torch.tensor([e / sum(expected) for e in expected])
    torch.testing.assert_close(out.weights, expected)
    torch.testing.assert_close(run.trainer.log_q.exp(), torch.full((3,), 1 / 3))
    assert not out.weights.requires_grad


def test_eta_0_is_basic():
    found, basic = trained("groupdro_basic", {"groupdro": {"eta": 0}}), trained("basic")
    for name, tensor in found.live.items():
        torch.testing.assert_close(tensor, basic.live[name], rtol=1e-4, atol=1e-5)


def test_weights_multiply_those_there_are():
    run = run_of("groupdro_basic", {"groupdro": {"eta": 1.0}})
    batch = run.batches(0)
    whole = run.loss(batch).weights
    one = run.loss(replace(batch, weights=torch.tensor([0.0, 1.0, 0.0]))).weights
    torch.testing.assert_close(one, torch.stack([one[0] * 0, 3 * whole[1], one[0] * 0]))


def test_a_step_of_two_passes_moves_q_once_by_the_risks_of_the_first():
    run = toy_run("groupdro_sam_basic", {"groupdro": {"eta": ETA}, "sam": {"rho": 0.5}})
    risks = run.step(run.batches(0)).risks
    run.t += 1
    run.tap("after_step")
    expected = torch.softmax(ETA * risks.detach(), dim=0)
    torch.testing.assert_close(run.trainer.log_q.exp(), expected)
    run.tap("after_step")
    torch.testing.assert_close(run.trainer.log_q.exp(), expected, msg="no step, no move")


def test_a_weight_that_was_tiny_comes_back():
    run = run_of("groupdro_basic", {"groupdro": {"eta": 1.0}})
    link, high = run.trainer, torch.tensor([200.0, 0.0, 0.0])
    for risks in (high, high.roll(1), high.roll(1)):
        link.log_q.copy_(link._moved(risks))
    assert link.log_q.exp()[1] > 0.99


def test_order_across_planes_makes_no_difference():
    settings = {"groupdro": {"eta": ETA}, "sam": {"rho": 0.5}}
    runs = [toy_run(spec, settings) for spec in ("groupdro_sam_basic", "sam_groupdro_basic")]
    for run in runs:
        fit(run)
    assert same(runs[0].live, runs[1].live)


def test_soft_labels_train():
    fit(toy_run("groupdro_mixup_basic"))


def test_default_is_domainbeds():
    assert GroupDRO(chain("basic")).settings() == {"eta": 0.01}


@pytest.mark.parametrize("eta", [-0.1, float("nan"), float("inf")])
def test_an_eta_out_of_range_is_refused(eta):
    with pytest.raises(UserError, match=r"trainer\.groupdro\.eta=.*: a finite number from 0 on"):
        chain("groupdro_basic", groupdro={"eta": eta})


def test_a_single_domain_is_refused():
    with pytest.raises(UserError, match="'groupdro' needs at least 2 training domains, here is 1"):
        run_of("groupdro_basic", domains=1)


def test_the_contract():
    check_link("groupdro", eta=ETA)
