"""PCGrad against the paper's two loops over tasks, in float64."""

from __future__ import annotations

import pytest
import torch
from plain import assert_weights, forward, plain_training, risks_of, run_of, trained

from dgavg.trainers.gradient.pcgrad import orders, shares


def project(gradients, order):
    """Algorithm 1 of the paper, but the mean of the projected gradients."""
    projected = [g.clone() for g in gradients]
    for i, others in enumerate(order):
        for j in others:
            along = projected[i] @ gradients[j]
            if along < 0:
                projected[i] -= along / (gradients[j] @ gradients[j]) * gradients[j]
    return sum(projected) / len(projected)


def order_at(t, domains=3):
    run = run_of("basic")
    run.t = t
    return orders(run.random("pcgrad"), domains)


def test_training_projects_conflicting_gradients():
    conflicts = []

    def gradient(model, batch, t):
        _, logits = forward(model, batch)
        parameters = list(model.parameters())
        rows = [
            torch.cat([g.flatten() for g in torch.autograd.grad(r, parameters, retain_graph=True)])
            for r in risks_of(logits, batch)
        ]
        conflicts.append(min(float(rows[i] @ rows[j]) for i in range(3) for j in range(i)) < 0)
        found = project(rows, order_at(t)).split([p.numel() for p in parameters])
        for p, part in zip(parameters, found, strict=True):
            p.grad = part.view_as(p)

    run, model = trained("pcgrad_basic"), plain_training(gradient=gradient)
    assert any(conflicts)
    assert_weights(run.live, model.state_dict())
    basic = trained("basic").live["classifier.weight"]
    assert (run.live["classifier.weight"] - basic).abs().max() > 1e-4


@pytest.mark.parametrize("domains", [2, 3, 5, 8])
@pytest.mark.parametrize("size", [3, 30])
def test_projections_on_the_dot_products_are_those_of_the_loop(domains, size):
    random = torch.Generator().manual_seed(domains)
    rows = torch.randn(domains, size, generator=random, dtype=torch.float64)
    order = order_at(0, domains)
    found = shares(rows @ rows.T, order) @ rows
    torch.testing.assert_close(found, project(list(rows), order))
    if size == 3:  # in few dimensions there is always a conflict
        assert (found - rows.mean(dim=0)).abs().max() > 1e-6


def test_two_opposite_gradients_cancel():
    rows = torch.tensor([[1.0, 0.0], [-2.0, 0.0]], dtype=torch.float64)
    assert (shares(rows @ rows.T, [[1], [0]]) @ rows).abs().max() < 1e-12


def test_gradients_without_conflict_are_averaged():
    rows = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    assert shares(rows @ rows.T, [[1, 2], [2, 0], [0, 1]]).tolist() == [1 / 3] * 3


def test_every_domain_meets_all_others_in_an_order_of_its_own_that_changes():
    found = [order_at(t, 5) for t in range(4)]
    for order in found:
        assert [sorted(others) for others in order] == [
            [j for j in range(5) if j != i] for i in range(5)
        ]
    assert len({str(order) for order in found}) == 4
    assert len({tuple(j - (j > i) for j in others) for i, others in enumerate(found[0])}) > 1
    assert order_at(2, 5) == found[2]
