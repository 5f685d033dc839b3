"""WeightSubspace against samples kept whole, and bases written out, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dgavg.averaging.subspace import WeightSubspace


def small(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def vector(tensors):
    """All parameters as one float64 vector."""
    return torch.cat([t.detach().double().flatten() for t in tensors])


@torch.no_grad()
def walk(model, subspace, steps, spread=0.05, seed=1):
    """A random walk taken in step by step; its points (steps, D) in float64."""
    random, points = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        for p in model.parameters():
            p += spread * torch.randn(p.shape, generator=random, dtype=torch.float64).to(p.dtype)
        subspace.update(model)
        points.append(vector(model.parameters()))
    return torch.stack(points)


def weights_of(subspace, coefficients=None):
    return vector(subspace.weights(coefficients).values())


def spanned(samples, centred=True):
    """An orthonormal basis (D, r) of the span, by QR."""
    if centred:
        samples = samples[1:] - samples[:1]
    return torch.linalg.qr(samples.T).Q


def directions(subspace, samples):
    """The basis that is never formed, formed: (r, D)."""
    return subspace.basis().T @ (samples - samples.mean(dim=0) if subspace.centred else samples)


@pytest.mark.parametrize(("k", "steps"), [(1, 1), (1, 3), (2, 5), (4, 2), (4, 4), (4, 5), (4, 23)])
def test_each_sample_comes_back_and_the_default_is_their_mean(k, steps):
    model = small()
    subspace = WeightSubspace(model, k=k)
    samples = walk(model, subspace, steps)[-k:]
    n = subspace.samples
    assert n == len(samples) == min(k, steps)
    assert subspace.coefficients.tolist() == pytest.approx([1 / n] * n)
    torch.testing.assert_close(weights_of(subspace), samples.mean(dim=0), rtol=0, atol=2e-7)
    for one, sample in zip(torch.eye(n), samples, strict=True):  # oldest first
        torch.testing.assert_close(weights_of(subspace, one), sample, rtol=0, atol=1e-7)


def test_the_first_sample_and_the_mean_of_equal_ones_are_exact():
    model = small()
    subspace = WeightSubspace(model, k=3)
    for _ in range(7):
        subspace.update(model)
        assert weights_of(subspace).equal(vector(model.parameters()))


@pytest.mark.parametrize(
    ("centred", "spread"),
    [(True, 1.0), (True, 1e-2), (True, 1e-4), (True, 1e-6), (False, 1.0), (False, 1e-2)],
)
def test_the_basis_is_orthonormal_and_spans_the_samples(centred, spread):
    model = nn.Linear(200, 100)
    subspace = WeightSubspace(model, k=6, centred=centred)
    samples = walk(model, subspace, 9, spread=spread)[-6:]
    rows = directions(subspace, samples)
    assert len(rows) == (5 if centred else 6)
    error = (rows @ rows.T - torch.eye(len(rows), dtype=torch.float64)).abs().max()
    assert error < 1e-5
    q = spanned(samples, centred)
    torch.testing.assert_close(q @ (q.T @ rows.T), rows.T, rtol=0, atol=1e-5)


def test_the_widest_direction_is_the_first():
    model = small()
    subspace = WeightSubspace(model, k=4)
    samples = walk(model, subspace, 4)
    along = (samples - samples.mean(dim=0)) @ directions(subspace, samples).T
    widths = along.norm(dim=0)
    assert widths.equal(widths.sort(descending=True).values)


def test_directions_without_spread_are_dropped():
    model = small()
    subspace = WeightSubspace(model, k=5)
    first = copy.deepcopy(model.state_dict())
    for seed in (0, 1, 0, 1, 1):
        model.load_state_dict(first)
        torch.manual_seed(seed)
        nn.init.normal_(model[0].bias)
        subspace.update(model)
    assert subspace.basis().shape == (5, 1)
    assert subspace.basis().sum(dim=0).abs().max() < 1e-12


def test_coefficients_sum_to_one_where_directions_differ_most_in_width():
    model = nn.Linear(200, 100).double()
    subspace = WeightSubspace(model, k=4)
    for seed, spread in enumerate((1.0, 1.0, 3e-5, 3e-5)):
        walk(model, subspace, 1, spread=spread, seed=seed)
    assert subspace.basis().shape == (4, 3)
    assert (subspace.basis().sum(dim=0) / subspace.basis().norm(dim=0)).abs().max() < 1e-14


@pytest.mark.parametrize("centred", [True, False])
def test_equal_samples_have_no_directions_and_no_nan(centred):
    model = small()
    subspace = WeightSubspace(model, k=3, centred=centred)
    for _ in range(3):
        subspace.update(model)
    model(torch.ones(2, 5)).sum().backward()
    r = 0 if centred else 1
    assert subspace.basis().shape == (3, r)
    assert subspace.project(model).shape == (r,)
    found = subspace.weights(subspace.coefficients_at([0.0] * r))
    torch.testing.assert_close(vector(found.values()), vector(model.parameters()))


def test_samples_that_are_not_finite_have_no_basis():
    model = small()
    subspace = WeightSubspace(model, k=3)
    subspace.update(model)
    nn.init.constant_(model[0].bias, torch.inf)
    subspace.update(model)
    with pytest.raises(ValueError, match="the samples are not finite"):
        subspace.basis()


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("steps", [2, 4, 11])
def test_projecting_a_gradient_is_multiplying_by_the_basis(centred, steps):
    model = small()
    subspace = WeightSubspace(model, k=4, centred=centred)
    samples = walk(model, subspace, steps, spread=1e-3)[-4:]
    model(torch.randn(9, 5)).square().sum().backward()
    gradient = vector(p.grad for p in model.parameters())
    rows = directions(subspace, samples)
    found = subspace.project(model)
    torch.testing.assert_close(found, rows @ gradient, rtol=1e-4, atol=1e-4)
    q = spanned(samples, centred)
    torch.testing.assert_close(rows.T @ found, q @ (q.T @ gradient), rtol=1e-3, atol=1e-3)
    named = {k: p.grad for k, p in model.named_parameters()}
    assert subspace.project(named).equal(found)
    torch.testing.assert_close(
        subspace.projected_mean(), rows @ samples.mean(dim=0), rtol=1e-3, atol=1e-5
    )


def test_projecting_does_not_cancel_where_samples_hardly_differ():
    """The products with whole samples are off by some per cent here."""
    model = nn.Linear(1000, 500, bias=False)
    nn.init.normal_(model.weight)
    subspace = WeightSubspace(model, k=3)
    samples = walk(model, subspace, 3, spread=1e-4)
    model.weight.grad = torch.randn_like(model.weight)
    exact = directions(subspace, samples) @ vector([model.weight.grad])
    torch.testing.assert_close(subspace.project(model), exact, rtol=1e-4, atol=1e-4)


def test_gradients_of_a_wrapped_model_go_by_its_own_names():
    model = small()
    subspace = WeightSubspace(model, k=3)
    walk(model, subspace, 3)
    compiled = torch.compile(model, backend="eager")
    compiled(torch.randn(9, 5)).square().sum().backward()
    assert {k.partition(".")[0] for k, _ in compiled.named_parameters()} == {"_orig_mod"}
    assert subspace.project(compiled).equal(subspace.project(model))


def test_missing_gradients_count_as_zero():
    model = small()
    subspace = WeightSubspace(model, k=3)
    samples = walk(model, subspace, 3)
    assert subspace.project(model).tolist() == [0.0, 0.0]
    model[2].bias.grad = torch.ones(3)
    gradient = torch.cat([torch.zeros(len(samples[0]) - 3), torch.ones(3)]).double()
    expected = directions(subspace, samples) @ gradient
    for found in (model, {"2.bias": torch.ones(3)}, {"2.bias": torch.ones(3), "0.bias": None}):
        torch.testing.assert_close(subspace.project(found), expected, rtol=1e-5, atol=1e-6)


def test_gradients_of_another_model_are_refused():
    subspace = WeightSubspace(small(), k=2)
    subspace.update(small())
    with pytest.raises(ValueError, match=r"a gradient of head\.bias, which the model does not"):
        subspace.project({"head.bias": torch.ones(3)})
    with pytest.raises(ValueError, match=r"gradient of 2\.bias is \(1,\), the weights \(3,\)"):
        subspace.project({"2.bias": torch.ones(1)})


@pytest.mark.parametrize("centred", [True, False])
def test_coordinates_are_coefficients(centred):
    model = small()
    subspace = WeightSubspace(model, k=4, centred=centred)
    samples = walk(model, subspace, 6)[-4:]
    rows = directions(subspace, samples)
    beta = torch.linspace(-1, 2, len(rows), dtype=torch.float64)
    coefficients = subspace.coefficients_at(beta)
    assert (abs(coefficients.sum().item() - 1) < 1e-12) == centred
    expected = samples.mean(dim=0) + beta @ rows
    torch.testing.assert_close(weights_of(subspace, coefficients), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"beta is \(1,\): a number for each of"):
        subspace.coefficients_at([0.5])


def test_chosen_coefficients_are_what_it_gives_until_the_next_update():
    model = small()
    subspace = WeightSubspace(model, k=3)
    samples = walk(model, subspace, 5)[-3:]
    subspace.coefficients = [2.0, -0.5, 0.25]
    expected = torch.tensor([2.0, -0.5, 0.25]).double() @ samples
    torch.testing.assert_close(weights_of(subspace), expected, rtol=0, atol=1e-6)
    before = vector(model.parameters())
    with subspace.applied_to(model):
        torch.testing.assert_close(vector(model.parameters()), expected, rtol=0, atol=1e-6)
    assert vector(model.parameters()).equal(before)
    places = [p.data_ptr() for p in model.parameters()]
    subspace.copy_to(model)
    torch.testing.assert_close(vector(model.parameters()), expected, rtol=0, atol=1e-6)
    subspace.copy_to(model, [0.0, 0.0, 1.0])
    torch.testing.assert_close(vector(model.parameters()), samples[2], rtol=0, atol=1e-7)
    assert [p.data_ptr() for p in model.parameters()] == places
    subspace.coefficients.fill_(7.0)  # a copy
    assert subspace.coefficients.tolist() == [2.0, -0.5, 0.25]
    subspace.update(model)
    assert subspace.coefficients.tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("values", [[1.0], [1.0] * 4, [[1.0, 0.0, 0.0]], 1.0])
def test_another_number_of_coefficients_is_refused(values):
    model = small()
    subspace = WeightSubspace(model, k=5)
    walk(model, subspace, 3)
    with pytest.raises(ValueError, match=r"coefficients are \(.*\): a number for each of the 3 "):
        subspace.coefficients = values
    with pytest.raises(ValueError, match="a number for each of the 3 samples"):
        subspace.weights(values)


def test_before_the_first_update_there_is_nothing():
    model = small()
    subspace = WeightSubspace(model)
    for call in (subspace.basis, subspace.weights, lambda: subspace.copy_to(model)):
        with pytest.raises(ValueError, match="no weights have been averaged yet"):
            call()
    with pytest.raises(ValueError, match="no weights have been averaged yet"):
        subspace.coefficients = []


@pytest.mark.parametrize("k", [0, 1.5])
def test_a_number_of_samples_that_is_none_is_refused(k):
    with pytest.raises(ValueError, match=f"k={k}: a number of models from 1 on"):
        WeightSubspace(small(), k=k)


def test_start_and_interval_choose_the_samples():
    model = small()
    subspace = WeightSubspace(model, k=2, start=1, interval=3)
    points = walk(model, subspace, 9)
    expected = points[[4, 7]].mean(dim=0)
    torch.testing.assert_close(weights_of(subspace), expected, rtol=0, atol=2e-7)


@pytest.mark.parametrize("steps", [2, 3, 8])
def test_it_goes_on_from_its_state_to_the_bit(steps):
    model = small()
    straight, resumed = WeightSubspace(model, k=3), WeightSubspace(small(), k=3)
    walk(model, straight, steps)
    resumed.update(model)
    resumed.basis()  # of another sample: must not be kept
    straight.coefficients = torch.linspace(-1, 1, straight.samples)
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    for _ in range(4):
        assert resumed.coefficients.equal(straight.coefficients)
        assert resumed.basis().equal(straight.basis())
        assert weights_of(resumed).equal(weights_of(straight))
        nn.init.normal_(model[0].weight)
        straight.update(model)
        resumed.update(model)
    with pytest.raises(ValueError, match="another average: k=2 there, 3 here"):
        resumed.load_state_dict(WeightSubspace(model, k=2).state_dict())


def test_the_basis_is_that_of_the_samples_of_now():
    model = small()
    subspace = WeightSubspace(model, k=2)
    walk(model, subspace, 2)
    first = subspace.basis()
    assert subspace.basis() is first  # nothing is computed twice
    walk(model, subspace, 1)
    assert not subspace.basis().equal(first)


def test_after_a_restart_it_takes_in_samples_as_at_first():
    model = small()
    subspace = WeightSubspace(model, k=4)
    walk(model, subspace, 6)
    subspace.restart()
    samples = torch.empty(0)
    for n in range(1, 7):
        samples = torch.cat([samples, walk(model, subspace, 1, seed=n)])[-4:]
        assert subspace.basis().shape == (min(n, 4), min(n, 4) - 1)
        assert subspace.coefficients.tolist() == [1 / min(n, 4)] * min(n, 4)
        for one, sample in zip(torch.eye(len(samples)), samples, strict=True):
            torch.testing.assert_close(weights_of(subspace, one), sample, rtol=0, atol=1e-7)
