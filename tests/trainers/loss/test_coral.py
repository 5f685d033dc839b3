"""CORAL against DomainBed's loop over all pairs of domains."""

from __future__ import annotations

import pytest
import torch
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

from dgavg import UserError
from dgavg.trainers.loss.coral import penalty


def mmd(x, y):
    """`AbstractMMD.mmd` of DomainBed without the Gaussian kernel."""
    mean_x, mean_y = x.mean(0, keepdim=True), y.mean(0, keepdim=True)
    cent_x, cent_y = x - mean_x, y - mean_y
    cova_x = (cent_x.t() @ cent_x) / (len(x) - 1)
    cova_y = (cent_y.t() @ cent_y) / (len(y) - 1)
    return (mean_x - mean_y).pow(2).mean() + (cova_x - cova_y).pow(2).mean()


def over_pairs(features):
    total, pairs = 0.0, 0
    for i in range(len(features)):
        for j in range(i + 1, len(features)):
            total, pairs = total + mmd(features[i], features[j]), pairs + 1
    return total / pairs


@pytest.mark.parametrize("domains", [2, 3, 5])
def test_the_penalty_and_its_gradient_are_the_mean_over_all_pairs(domains):
    random = torch.Generator().manual_seed(domains)
    features = torch.randn(domains, 6, 4, generator=random, dtype=torch.float64).requires_grad_()
    found, expected = penalty(features), over_pairs(features)
    torch.testing.assert_close(found, expected)
    slopes = [torch.autograd.grad(value, features)[0] for value in (found, expected)]
    torch.testing.assert_close(slopes[0], slopes[1])


def test_training_adds_the_weighted_penalty_on_the_features():
    def loss(model, batch, t):
        features, logits = forward(model, batch)
        domains = [features[rows] for rows in domains_of(batch)]
        return mean(risks_of(logits, batch)) + 2.5 * over_pairs(domains)

    run = trained("coral_basic", {"coral": {"weight": 2.5}})
    assert_weights(run.live, plain_training(loss).state_dict())


def test_one_image_of_a_domain_is_refused():
    with pytest.raises(UserError, match="coral needs at least 2 images of each domain a batch"):
        run_of("coral_basic", rows=1)


def test_a_single_domain_is_refused():
    with pytest.raises(UserError, match="'coral' needs at least 2 training domains, here is 1"):
        run_of("coral_basic", domains=1)
