"""WeightSubspace on every kind of tensor, in every layout, and what it allocates."""

from __future__ import annotations

import copy

import pytest
import torch
from live_bytes import LiveBytes
from torch import nn

from dgavg.averaging.rows import CHUNK
from dgavg.averaging.subspace import WeightSubspace

SHARES = [0.7, -0.4, 0.9]


class Kinds(nn.Module):
    """Tied, complex, empty, frozen, low-precision, integer and boolean tensors; batch norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.phase = nn.Parameter(torch.randn(4, dtype=torch.complex64))
        self.none = nn.Parameter(torch.zeros(0))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.low = nn.Parameter(torch.randn(5, dtype=torch.bfloat16))
        self.high = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("seen", torch.tensor(7))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("hidden", torch.zeros(2), persistent=False)

    def forward(self, x):
        h = self.norm(self.second(self.first(x)))
        extra = self.low.sum() * self.high.prod()
        turned = (self.phase * torch.complex(torch.tensor(0.5), torch.tensor(2.0))).imag.sum()
        return h.square().mean() + extra + turned * self.phase.abs().sum()


@torch.no_grad()
def taken_in(model, subspace, steps=3):
    """Everything in the model moves and is taken in, `steps` times; the states it had."""
    states = []
    for step in range(steps):
        for tensor in {id(t): t for t in model.state_dict().values()}.values():
            if tensor.is_floating_point() or tensor.is_complex():
                tensor.add_(torch.randn_like(tensor), alpha=0.1)
        model.seen += 1
        model.mask.logical_not_()
        model.norm.running_var.abs_()
        model.hidden.fill_(step)
        subspace.update(model)
        states.append(copy.deepcopy(model.state_dict()))
    return states


def mixed(states, name, shares):
    stack = torch.stack([s[name] for s in states])
    wide = torch.complex128 if stack.is_complex() else torch.float64
    return torch.tensordot(torch.tensor(shares, dtype=wide), stack.to(wide), dims=1)


@pytest.mark.parametrize("policy", ["copy", "average"])
@pytest.mark.parametrize("steps", [3, 5])
def test_weights_are_mixed_and_buffers_are_not(policy, steps):
    model = Kinds()
    subspace = WeightSubspace(model, k=3, buffers=policy)
    states = taken_in(model, subspace, steps)[-3:]
    weights = subspace.weights(SHARES)
    assert list(weights) == list(states[0])
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, found in weights.items():
        assert found.dtype == states[0][name].dtype
        if name in parameters:
            expected = mixed(states, name, SHARES)
        elif found.is_floating_point() and policy == "average":
            expected = mixed(states, name, [1 / 3] * 3)
        else:
            expected = states[-1][name]
        tolerance = 1e-2 if found.dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(found, expected.to(found.dtype), rtol=tolerance, atol=tolerance)
    assert weights["first.weight"].data_ptr() == weights["second.weight"].data_ptr()
    taken_in(model, WeightSubspace(model), 1)  # it moves on
    subspace.copy_to(model, SHARES)
    for name, tensor in model.state_dict().items():
        assert tensor.equal(weights[name]), name
    last = steps - 1.0  # what the hidden buffer was filled with
    assert model.hidden.tolist() == pytest.approx([last if policy == "copy" else last - 1] * 2)


def test_a_mapping_tells_its_buffers_by_name():
    model = Kinds()
    names = frozenset(k for k, _ in model.named_buffers() if k in model.state_dict())
    of_model = WeightSubspace(model, k=3, buffers="average")
    options = {"buffers": "average", "buffer_names": names}
    of_mapping = WeightSubspace(model.state_dict(), k=3, **options)
    for _ in range(4):
        taken_in(model, of_model, 1)
        of_mapping.update(model.state_dict())
    assert of_mapping.basis().equal(of_model.basis())
    for name, tensor in of_mapping.weights(SHARES).items():
        assert tensor.equal(of_model.weights(SHARES)[name]), name


def test_averaged_buffers_do_not_count_for_the_basis():
    model = Kinds()
    plain, averaged = WeightSubspace(model, k=3), WeightSubspace(model, k=3, buffers="average")
    for seed in range(3):
        torch.manual_seed(seed)
        taken_in(model, averaged, 1)
        plain.update(model)
    torch.testing.assert_close(plain.basis(), averaged.basis(), rtol=1e-12, atol=1e-12)
    gradients = {"norm.running_mean": torch.ones(3), "seen": torch.ones(())}
    assert averaged.project(gradients).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("centred", [True, False])
def test_slopes_are_those_of_the_loss_along_the_basis(centred):
    """Of a model with every kind of parameter: by finite differences in the coefficients."""
    model = Kinds().double()
    model.phase.data = model.phase.data.to(torch.complex128)
    model.eval()
    subspace = WeightSubspace(model, k=3, centred=centred)
    taken_in(model, subspace, 5)
    x = torch.randn(6, 3, dtype=torch.float64)

    def loss(beta):
        subspace.copy_to(model, subspace.coefficients_at(beta))
        return model(x)

    r = subspace.basis().shape[1]
    loss(torch.zeros(r)).backward()
    slopes = subspace.project(model)
    for i, step in enumerate(1e-5 * torch.eye(r, dtype=torch.float64)):
        expected = (loss(step) - loss(-step)) / 2e-5
        assert slopes[i].item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-8)


def test_gradients_of_tied_parameters_are_summed_and_one_tensor_counts_once():
    model = Kinds()
    subspace = WeightSubspace(model, k=3)
    taken_in(model, subspace)
    one, two = torch.randn(3, 3), torch.randn(3, 3)
    both = subspace.project({"first.weight": one, "second.weight": two})
    sum_ = subspace.project({"first.weight": one + two})
    torch.testing.assert_close(both, sum_, rtol=1e-5, atol=1e-6)
    twice = subspace.project({"first.weight": one, "second.weight": one})
    assert twice.equal(subspace.project({"second.weight": one}))


def test_conjugated_sparse_and_transposed_gradients_are_taken_as_they_are():
    model = Kinds()
    subspace = WeightSubspace(model, k=3)
    taken_in(model, subspace)
    phase, weight = torch.randn(4, dtype=torch.complex64), torch.randn(3, 3)
    for name, strange, plain in (
        ("phase", phase.conj(), phase.conj().resolve_conj()),
        ("first.weight", weight.T, weight.T.contiguous()),
        ("first.weight", weight.to_sparse(), weight),
        ("first.weight", weight[0].expand(3, 3), weight[0].repeat(3, 1)),
        ("low", torch.ones(5, dtype=torch.bfloat16), torch.ones(5)),
    ):
        found = subspace.project({name: strange})
        assert found.abs().max() > 1e-3
        assert found.equal(subspace.project({name: plain})), name


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_layout_of_model_and_gradient_makes_no_difference(layout):
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 3)
    subspace, points = WeightSubspace(copy.deepcopy(model).to(memory_format=layout), k=3), []
    for source in (model, copy.deepcopy(model).to(memory_format=torch.channels_last), model, model):
        with torch.no_grad():
            for p in source.parameters():
                p += torch.randn(p.shape)
        subspace.update(source)
        points.append(source.weight.detach().double().clone(memory_format=torch.contiguous_format))
    expected = torch.tensordot(torch.tensor(SHARES).double(), torch.stack(points[-3:]), dims=1)
    gradient, found = torch.randn(4, 3, 3, 3), []
    for memory_format in (torch.channels_last, torch.contiguous_format):
        target = copy.deepcopy(model).to(memory_format=memory_format)
        subspace.copy_to(target, SHARES)
        torch.testing.assert_close(target.weight.double(), expected, rtol=1e-5, atol=1e-5)
        found.append(subspace.project({"weight": gradient.to(memory_format=memory_format)}))
    assert found[0].equal(found[1])
    assert found[0].abs().max() > 1e-3


def test_weights_longer_than_one_chunk():
    torch.manual_seed(0)
    model = nn.Linear(CHUNK // 8 + 3, 17)
    subspace, points = WeightSubspace(model, k=3), []
    for _ in range(3):
        nn.init.normal_(model.weight)
        subspace.update(model)
        points.append(model.weight.detach().double())
        points[-1] = points[-1].clone()
    subspace.copy_to(model, SHARES)
    expected = torch.tensordot(torch.tensor(SHARES).double(), torch.stack(points), dims=1)
    torch.testing.assert_close(model.weight.detach().double(), expected, rtol=1e-5, atol=1e-5)
    gradient = torch.randn_like(model.weight)
    exact = torch.stack([(p * gradient).sum() for p in points])
    found = subspace.project({"weight": gradient})
    torch.testing.assert_close(found, subspace.basis().T @ exact, rtol=1e-4, atol=1e-4)
    flat = torch.stack(points).flatten(1)
    rows = subspace.basis().T @ (flat - flat.mean(dim=0))
    torch.testing.assert_close(rows @ rows.T, torch.eye(2).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_samples_in_low_precision_are_mixed_in_float32(dtype):
    model = nn.Linear(40, 30, dtype=dtype)
    subspace, points = WeightSubspace(model, k=3), []
    for _ in range(3):
        nn.init.normal_(model.weight)
        subspace.update(model)
        points.append(model.weight.detach().double())
    points = [p.clone() for p in points]
    for one, point in zip(torch.eye(3), points, strict=True):
        assert subspace.weights(one)["weight"].double().equal(point)  # not to rounding: exactly
    rows = torch.stack([(p - sum(points) / 3).flatten() for p in points])
    rows = subspace.basis().T @ rows
    torch.testing.assert_close(
        rows @ rows.T + 1, torch.eye(2).double() + 1, rtol=0, atol=2e-3
    )  # the bias is missing


def test_it_follows_a_model_to_another_precision_and_back():
    single, double = torch.float32, torch.float64
    model = nn.Linear(4, 3)
    subspace, points = WeightSubspace(model, k=3), []
    for dtype in (*[single] * 4, double, single, double, torch.bfloat16, single):
        model.to(dtype)
        nn.init.normal_(model.weight)
        subspace.update(model)
        assert subspace.weights()["weight"].dtype == dtype
        points = [*points, model.weight.detach().double().clone()][-3:]
        close = 1e-2 if dtype == torch.bfloat16 else 1e-6
        for one, point in zip(torch.eye(len(points)), points, strict=True):
            found = subspace.weights(one)["weight"].double()
            torch.testing.assert_close(found, point, rtol=close, atol=close)
    assert subspace.state_dict()["tensors"]["samples/weight"].dtype == double


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("device", [None, "cpu", "cuda"])
def test_it_follows_a_model_to_another_device_or_keeps_its_own(device):
    model, twin = nn.Linear(400, 300), nn.Linear(400, 300)
    subspace, on_cpu = WeightSubspace(model, k=3, device=device), WeightSubspace(twin, k=3)
    for place in ("cpu", "cuda", "cuda", "cpu", "cuda"):
        nn.init.normal_(twin.weight)
        model.to(place).load_state_dict(twin.state_dict())
        subspace.update(model)
        on_cpu.update(twin)
        rows = [v for k, v in subspace.state_dict()["tensors"].items() if "weight" in k]
        assert {t.device.type for t in rows} == {device or place}
    gradients = {"weight": torch.randn(300, 400)}
    for where in ("cpu", "cuda"):
        moved = {k: v.to(where) for k, v in gradients.items()}
        expected = on_cpu.basis() @ on_cpu.project(gradients)  # whatever the signs of the basis
        found = subspace.basis() @ subspace.project(moved)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    subspace.copy_to(model, SHARES)
    on_cpu.copy_to(twin, SHARES)
    torch.testing.assert_close(model.weight.cpu(), twin.weight, rtol=1e-5, atol=1e-5)


def test_a_copy_is_a_subspace_of_its_own():
    model = nn.Linear(4, 3)
    subspace = WeightSubspace(model, k=2)
    for _ in range(3):
        nn.init.normal_(model.weight)
        subspace.update(model)
    other = copy.deepcopy(subspace)
    kept = other.weights()["weight"].clone()
    nn.init.normal_(model.weight)
    subspace.update(model)
    assert other.weights()["weight"].equal(kept)
    other.update(model)
    assert other.weights()["weight"].equal(subspace.weights()["weight"])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_is_what_the_docstring_says(layout):
    model = nn.Conv2d(150, 1000, (2, 5)).to(memory_format=layout)
    size = sum(p.numel() * 4 for p in model.parameters())
    with LiveBytes() as held:
        subspace = WeightSubspace(model, k=6)
    assert 6 * size <= held.peak < 6.01 * size
    for _ in range(8):
        nn.init.normal_(model.weight)
        with LiveBytes() as held:
            subspace.update(model)
        assert held.peak < 2000
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for work, most in (
        (subspace.basis, 4 * 2**20 + 2000),
        (lambda: subspace.project(model), 3000),
        (lambda: subspace.copy_to(model), 3000),
        (lambda: subspace.copy_to(model, [0.5] * 6), 3000),
        (subspace.weights, 1.01 * size),
    ):
        with LiveBytes() as held:
            work()
        assert held.peak <= most, (most, held.peak)
