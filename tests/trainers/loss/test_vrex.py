"""VREx against a loop over domains."""

from __future__ import annotations

import pytest
from plain import assert_weights, forward, mean, plain_training, risks_of, run_of, trained

from dgavg import UserError


def vrex(weight, anneal):
    def loss(model, batch, t):
        _, logits = forward(model, batch)
        risks = risks_of(logits, batch)
        spread = mean([(risk - mean(risks)) ** 2 for risk in risks])
        return mean(risks) + (weight if t >= anneal else 1.0) * spread

    return loss


@pytest.mark.parametrize("anneal", [0, 5, 11])
def test_training_weighs_1_before_anneal_and_resets_the_optimizer_there_once(anneal):
    run = trained("vrex_basic", {"vrex": {"weight": 5.0, "anneal": anneal}})
    model = plain_training(vrex(5.0, anneal), renew_at=anneal)
    assert_weights(run.live, model.state_dict())


def test_a_single_domain_is_refused():
    with pytest.raises(UserError, match="'vrex' needs at least 2 training domains, here is 1"):
        run_of("vrex_basic", domains=1)
