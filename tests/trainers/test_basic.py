"""Basic against a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from plain import assert_weights, plain_training, run_of, trained

from dgavg import fit


def test_training_is_a_plain_loop():
    assert_weights(trained("basic").live, plain_training().state_dict())


def test_risks_are_the_mean_cross_entropies_of_the_domains():
    run = run_of("basic", rows=5)
    batch = run.batches(0)
    loss = run.loss(batch)
    logits = loss.logits.detach().numpy().astype(np.float64)
    errors = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(15), batch.y.numpy()]
    expected = [errors[batch.d.numpy() == i].mean() for i in range(3)]
    np.testing.assert_allclose(loss.risks.detach().numpy(), expected, rtol=1e-5)
    assert loss.total.item() == pytest.approx(np.mean(expected), rel=1e-5)
    assert loss.features.shape == (15, 8)


def test_labels_may_be_probabilities():
    run = run_of("basic")
    batch = run.batches(0)
    hard = run.loss(batch).risks
    batch.y = torch.nn.functional.one_hot(batch.y, 3).float()
    torch.testing.assert_close(run.loss(batch).risks, hard)


def test_the_learning_rate_is_the_optimizers_times_the_schedule_at_each_step():
    run = run_of("basic", schedule=lambda t: 1 / (t + 1))
    found = []
    fit(run, after_step=lambda run: found.append(run.optimizer.param_groups[0]["lr"]))
    assert found == pytest.approx([0.1 / (t + 1) for t in range(12)])


def test_gradients_of_two_steps_do_not_add_up():
    run = run_of("basic")
    batch = run.batches(0)
    run.model.eval()
    for _ in range(2):
        run.grad(batch)
    found = [p.grad.clone() for p in run.parameters]
    run.optimizer.zero_grad()
    run.loss(batch).total.backward()
    for grad, parameter in zip(found, run.parameters, strict=True):
        assert torch.equal(grad, parameter.grad)
