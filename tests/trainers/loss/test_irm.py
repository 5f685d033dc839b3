"""IRM against DomainBed's autograd on a dummy scale."""

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
    trained,
)

from dgavg import Batch, UserError
from dgavg.trainers.loss.irm import penalty


def irm_penalty(logits, y):
    """`IRM._irm_penalty` of DomainBed."""
    scale = torch.tensor(1.0, dtype=logits.dtype).requires_grad_()
    loss_1 = F.cross_entropy(logits[::2] * scale, y[::2])
    loss_2 = F.cross_entropy(logits[1::2] * scale, y[1::2])
    grad_1 = torch.autograd.grad(loss_1, [scale], create_graph=True)[0]
    grad_2 = torch.autograd.grad(loss_2, [scale], create_graph=True)[0]
    return torch.sum(grad_1 * grad_2)


def domainbed_penalty(logits, batch):
    return mean([irm_penalty(logits[rows], batch.y[rows]) for rows in domains_of(batch)])


def random_batch(rows, soft=False):
    random = torch.Generator().manual_seed(rows)
    logits = torch.randn(3 * rows, 4, generator=random, dtype=torch.float64) * 3
    y = torch.randint(4, (3 * rows,), generator=random)
    if soft:
        y = torch.rand(3 * rows, 4, generator=random, dtype=torch.float64).softmax(dim=1)
    d = torch.arange(3).repeat_interleave(rows)
    return logits.requires_grad_(), Batch(logits.detach(), y, d, domains=3)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("rows", [2, 7, 8])
def test_the_penalty_and_its_gradient_are_domainbeds(rows, soft):
    logits, batch = random_batch(rows, soft)
    found, expected = penalty(logits, batch), domainbed_penalty(logits, batch)
    torch.testing.assert_close(found, expected)
    slopes = [torch.autograd.grad(value, logits)[0] for value in (found, expected)]
    torch.testing.assert_close(slopes[0], slopes[1])


@pytest.mark.parametrize("anneal", [0, 5, 11])
def test_training_weighs_1_before_anneal_and_resets_the_optimizer_there_once(anneal):
    def loss(model, batch, t):
        _, logits = forward(model, batch)
        weight = 3.0 if t >= anneal else 1.0
        return mean(risks_of(logits, batch)) + weight * domainbed_penalty(logits, batch)

    run = trained("irm_basic", {"irm": {"weight": 3.0, "anneal": anneal}})
    assert_weights(run.live, plain_training(loss, renew_at=anneal).state_dict())


def test_one_image_of_a_domain_is_refused():
    with pytest.raises(UserError, match="irm needs at least 2 images of each domain a batch"):
        run_of("irm_basic", {"irm": {"anneal": 0}}, rows=1)
