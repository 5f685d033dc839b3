"""SubspaceSGD against projected training written out, in float64, over 50 steps."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dgavg.averaging.subspace import WeightSubspace
from dgavg.averaging.subspace_sgd import SubspaceSGD

STEPS = 50


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def batch(t, dtype=torch.float64):
    random = torch.Generator().manual_seed(100 + t)
    x = torch.randn(16, 4, generator=random, dtype=torch.float64)
    y = torch.randint(3, (16,), generator=random)
    return (x + y[:, None]).to(dtype), y


def vector(tensors):
    return torch.cat([t.detach().double().flatten() for t in tensors])


def sampled(model, subspace, samples=5):
    """Weights from training by large steps: (K, D) in float64."""
    optimizer, rows = torch.optim.SGD(model.parameters(), lr=0.3), []
    for t in range(4 * samples):
        x, y = batch(t, model[0].weight.dtype)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if t % 4 == 3:
            subspace.update(model)
            rows.append(vector(model.parameters()))
    return torch.stack(rows)


def set_weights(model, weights):
    parameters = list(model.parameters())
    parts = weights.split([p.numel() for p in parameters])
    with torch.no_grad():
        for p, part in zip(parameters, parts, strict=True):
            p.copy_(part.view(p.shape))


def gradient_at(model, weights, t):
    """The gradient of batch `t` at `weights`, a vector."""
    set_weights(model, weights)
    model.zero_grad()
    x, y = batch(t)
    F.cross_entropy(model(x), y).backward()
    return vector(p.grad for p in model.parameters())


def trained(model, subspace, sgd, steps=range(STEPS)):
    for t in steps:
        subspace.copy_to(model)
        model.zero_grad()
        x, y = batch(t, model[0].weight.dtype)
        F.cross_entropy(model(x), y).backward()
        sgd.step(model)
    return vector(subspace.weights().values())


def test_reg_alone_is_the_rule_of_dicee_with_the_gradient_at_the_average():
    model, rate, reg = network(), 0.5, 0.2
    subspace = WeightSubspace(model, k=5)
    samples = sampled(model, subspace)
    mean = samples.mean(dim=0)
    basis = torch.linalg.svd(samples - mean, full_matrices=False).Vh[:4].T  # the fifth is noise
    beta = torch.zeros(4, dtype=torch.float64)
    for t in range(STEPS):
        gradient = gradient_at(model, mean + basis @ beta, t)
        beta = (1 - rate * reg) * beta - rate * basis.T @ gradient
    found = trained(model, subspace, SubspaceSGD(subspace, lr=rate, reg=reg))
    torch.testing.assert_close(found, mean + basis @ beta, rtol=0, atol=1e-9)
    assert (found - mean).norm() > 0.1
    assert subspace.coefficients.sum().item() == pytest.approx(1)


def gram_schmidt(rows):
    found = []
    for row in rows:
        for other in found:
            row = row - (other @ row) * other
        found.append(row / row.norm())
    return torch.stack(found)


@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.9, 0.0), (0.0, 0.1), (0.9, 0.1)])
def test_through_the_origin_it_is_sgd_on_projected_gradients(momentum, decay):
    """As in nblt/TWA: Gram-Schmidt on the samples, the gradient projected, torch's SGD."""
    model = network()
    subspace = WeightSubspace(model, k=5, centred=False)
    samples = sampled(model, subspace)
    basis, plain = gram_schmidt(samples), copy.deepcopy(model)
    set_weights(plain, samples.mean(dim=0))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=momentum, weight_decay=decay)
    for t in range(STEPS):
        optimizer.zero_grad()
        x, y = batch(t)
        F.cross_entropy(plain(x), y).backward()
        projected = basis.T @ (basis @ vector(p.grad for p in plain.parameters()))
        parts = projected.split([p.numel() for p in plain.parameters()])
        for p, part in zip(plain.parameters(), parts, strict=True):
            p.grad = part.view(p.shape)
        optimizer.step()
    rule = SubspaceSGD(subspace, lr=0.1, momentum=momentum, weight_decay=decay)
    found = trained(model, subspace, rule)
    torch.testing.assert_close(found, vector(plain.parameters()), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("momentum", "decay", "reg"), [(0.9, 0.1, 0.0), (0.5, 0.0, 0.3)])
def test_centred_it_is_the_part_of_that_inside_the_plane(momentum, decay, reg):
    model = network()
    subspace = WeightSubspace(model, k=5)
    samples = sampled(model, subspace, samples=8)[-5:]
    mean = samples.mean(dim=0)
    basis = torch.linalg.qr((samples[1:] - samples[0]).T).Q
    beta = velocity = torch.zeros(4, dtype=torch.float64)
    for t in range(STEPS):
        weights = mean + basis @ beta
        step = basis.T @ (gradient_at(model, weights, t) + decay * weights) + reg * beta
        velocity = momentum * velocity + step
        beta = beta - 0.1 * velocity
    rule = SubspaceSGD(subspace, lr=0.1, momentum=momentum, weight_decay=decay, reg=reg)
    found = trained(model, subspace, rule)
    torch.testing.assert_close(found, mean + basis @ beta, rtol=0, atol=1e-9)


@pytest.mark.parametrize("centred", [True, False])
def test_in_float32_it_is_the_same_to_rounding(centred):
    samples, found = sampled(network(), WeightSubspace(network())), []
    for dtype in (torch.float64, torch.float32):
        model = network(dtype)
        subspace = WeightSubspace(model, k=5, centred=centred)
        for row in samples:
            set_weights(model, row)
            subspace.update(model)
        rule = SubspaceSGD(subspace, lr=0.1, momentum=0.9, weight_decay=0.01)
        found.append(trained(model, subspace, rule))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("steps_before", [0, 3])
def test_it_goes_on_from_its_state_to_the_bit(steps_before):
    model = network()
    subspace = WeightSubspace(model, k=4)
    sampled(model, subspace)
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    straight = SubspaceSGD(subspace, **options)
    trained(model, subspace, straight, range(7))
    other = WeightSubspace(network(), k=4)
    sampled(network(), other)
    resumed = SubspaceSGD(other, **options)
    trained(network(), other, resumed, range(20, 20 + steps_before))
    other.load_state_dict(copy.deepcopy(subspace.state_dict()))
    resumed.load_state_dict(straight.state_dict())
    whole = trained(model, subspace, straight, range(7, 12))
    assert trained(network(), other, resumed, range(7, 12)).equal(whole)
    assert resumed.velocity.equal(straight.velocity)


def test_a_new_sample_forgets_the_velocity():
    model = network()
    subspace, fresh = WeightSubspace(model, k=3), WeightSubspace(model, k=3)
    sampled(model, subspace)
    rule = SubspaceSGD(subspace, lr=0.1, momentum=0.9)
    trained(model, subspace, rule, range(5))
    set_weights(model, torch.randn_like(vector(model.parameters())))
    subspace.update(model)
    fresh.load_state_dict(copy.deepcopy(subspace.state_dict()))
    found = trained(model, subspace, rule, range(3))
    expected = trained(model, fresh, SubspaceSGD(fresh, lr=0.1, momentum=0.9), range(3))
    assert found.equal(expected)


def test_the_rate_may_change_between_steps():
    model = network()
    subspace = WeightSubspace(model, k=3)
    sampled(model, subspace)
    rule = SubspaceSGD(subspace, lr=0.1)
    model.zero_grad()
    F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    before = subspace.coefficients
    rule.step(model)
    small = subspace.coefficients - before
    subspace.coefficients, rule.lr = before, 0.3
    rule.step(model)
    torch.testing.assert_close(subspace.coefficients - before, 3 * small)


def test_one_sample_leaves_nothing_to_train():
    model = network()
    subspace = WeightSubspace(model, k=3)
    subspace.update(model)
    before = vector(model.parameters())
    rule = SubspaceSGD(subspace, lr=0.1, momentum=0.9, weight_decay=0.1, reg=0.1)
    assert trained(model, subspace, rule, range(3)).equal(before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, r"lr=0.0: a number above 0"),
        ({"lr": float("nan")}, r"lr=nan: a number above 0"),
        ({"lr": 1.0, "momentum": 1.0}, r"momentum=1.0: a number in \[0, 1\)"),
        ({"lr": 1.0, "weight_decay": -1.0}, r"weight_decay=-1.0: a number from 0 on"),
        ({"lr": 1.0, "reg": -1.0}, r"reg=-1.0: a number from 0 on"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SubspaceSGD(WeightSubspace(network()), **options)
