"""MMD against DomainBed's loop over all pairs of domains."""

from __future__ import annotations

import math

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

from dgavg import UserError, chain, fit
from dgavg.testing import check_link, toy_run
from dgavg.trainers.loss.mmd import MMD, kernel, penalty

WIDTHS = [10.0**k for k in range(-3, 4)]


def plain_kernel(a, b):
    """The sum of all Gaussian kernels of two rows."""
    distance = sum((p - q) ** 2 for p, q in zip(a, b, strict=True))
    return sum((-gamma * distance).exp() for gamma in WIDTHS)


def plain_mmd(x, y):
    """One pair: mean of k(x, x) + mean of k(y, y) - 2 mean of k(x, y)."""
    xx, yy, xy = (
        mean([plain_kernel(a, b) for a in p for b in q]) for p, q in ((x, x), (y, y), (x, y))
    )
    return xx + yy - 2 * xy


def over_pairs(domains):
    pairs = [(i, j) for i in range(len(domains)) for j in range(i + 1, len(domains))]
    return mean([plain_mmd(domains[i], domains[j]) for i, j in pairs])


def features_of(domains, rows=3, width=2):
    random = torch.Generator().manual_seed(domains)
    return torch.randn(domains, rows, width, generator=random, dtype=torch.float64)


@pytest.mark.parametrize("domains", [2, 3, 4])
def test_the_penalty_and_its_gradient_are_the_mean_over_all_pairs(domains):
    features = features_of(domains).requires_grad_()
    found, expected = penalty(features.flatten(0, 1), domains), over_pairs(features)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    slopes = [torch.autograd.grad(value, features)[0] for value in (found, expected)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-8, atol=1e-11)


def test_the_penalty_of_four_points_on_a_line():
    """Domains {0, 1} and {2, 3}: squared distances 0, 1, 4, 9, by hand."""
    k = {d: sum(math.exp(-gamma * d) for gamma in WIDTHS) for d in (0, 1, 4, 9)}
    within, across = (2 * k[0] + 2 * k[1]) / 4, (2 * k[4] + k[1] + k[9]) / 4
    points = torch.tensor([[0.0], [1.0], [2.0], [3.0]], dtype=torch.float64)
    found = penalty(points, 2).item()
    assert found == pytest.approx(2 * within - 2 * across, abs=1e-12)
    assert found == pytest.approx(4.8296409, abs=1e-6)


def test_far_from_0_nothing_is_lost_in_float32():
    features = features_of(3, rows=8).flatten(0, 1)
    near, far = penalty(features.float(), 3), penalty(features.float() + 4096, 3)
    moved = penalty((features.float() + 4096).double(), 3)
    torch.testing.assert_close(near.double(), penalty(features, 3), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(far.double(), moved, rtol=1e-3, atol=1e-4)


def test_a_second_derivative_exists():
    features = features_of(2).flatten(0, 1).requires_grad_()
    (slope,) = torch.autograd.grad(penalty(features, 2), features, create_graph=True)
    (second,) = torch.autograd.grad(slope.square().sum(), features)
    assert second.isfinite().all()
    assert second.abs().sum() > 0


def test_a_row_is_nearest_to_itself():
    torch.testing.assert_close(
        kernel(features_of(2).flatten(0, 1)).diagonal(), 7 * torch.ones(6).double()
    )


def test_training_adds_the_weighted_penalty_on_the_features():
    def loss(model, batch, t):
        features, logits = forward(model, batch)
        domains = [features[rows] for rows in domains_of(batch)]
        return mean(risks_of(logits, batch)) + 2.5 * over_pairs(domains)

    run = trained("mmd_basic", {"mmd": {"weight": 2.5}}, rows=4, steps=4)
    expected = plain_training(loss, rows=4, steps=4).state_dict()
    assert_weights(run.live, expected, rtol=1e-3, atol=5e-4)  # a kernel of width 1e-3 in float32


def test_weight_0_is_basic():
    found, basic = trained("mmd_basic", {"mmd": {"weight": 0}}), trained("basic")
    for name, tensor in found.live.items():
        torch.testing.assert_close(tensor, basic.live[name], rtol=1e-4, atol=1e-5)


def test_soft_labels_train():
    fit(toy_run("mmd_mixup_basic"))


def test_default_is_domainbeds():
    assert MMD(chain("basic")).settings() == {"weight": 1.0}


def test_a_negative_weight_is_refused():
    with pytest.raises(UserError, match=r"trainer\.mmd\.weight=-1\.0: a finite number from 0 on"):
        chain("mmd_basic", mmd={"weight": -1})


def test_a_single_domain_is_refused():
    with pytest.raises(UserError, match="'mmd' needs at least 2 training domains, here is 1"):
        run_of("mmd_basic", domains=1)


def test_the_contract():
    check_link("mmd", weight=1000.0)
