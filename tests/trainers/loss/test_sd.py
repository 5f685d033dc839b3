"""SD against the mean square of the logits, entry by entry."""

from __future__ import annotations

import pytest
import torch
from plain import assert_weights, forward, mean, plain_training, risks_of, trained

from dgavg import UserError, chain, fit
from dgavg.testing import check_link, toy_run
from dgavg.trainers.loss.sd import SD


def test_training_adds_the_weighted_mean_square_of_all_logits():
    def loss(model, batch, t):
        _, logits = forward(model, batch)
        squares = [z**2 for row in logits for z in row]
        return mean(risks_of(logits, batch)) + 2.5 * mean(squares)

    run = trained("sd_basic", {"sd": {"weight": 2.5}})
    assert_weights(run.live, plain_training(loss).state_dict())


def test_weight_0_is_basic():
    found, basic = trained("sd_basic", {"sd": {"weight": 0}}), trained("basic")
    for name, tensor in found.live.items():
        torch.testing.assert_close(tensor, basic.live[name], rtol=1e-4, atol=1e-5)


def test_default_is_domainbeds():
    assert SD(chain("basic")).settings() == {"weight": 0.1}


def test_soft_labels_and_one_domain_train():
    fit(toy_run("sd_mixup_basic"))
    fit(toy_run("sd_basic", domains=1))


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_out_of_range_is_refused(weight):
    with pytest.raises(UserError, match=r"trainer\.sd\.weight=.*: a finite number from 0 on"):
        chain("sd_basic", sd={"weight": weight})


def test_the_contract():
    check_link("sd", weight=10.0)


def test_the_term_is_a_scalar_in_the_log():
    run = toy_run("sd_basic", {"sd": {"weight": 3.0}})
    out = run.loss(run.batches(0))
    torch.testing.assert_close(out.terms["sd"], 3.0 * out.logits.pow(2).mean())
