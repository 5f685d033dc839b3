"""Learned soups: the gradient of the coefficients, what they learn, and the model they borrow."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from live_bytes import LiveBytes
from torch import nn
from torch.func import functional_call

from dgavg.averaging.learned_soup import _Learner, learned_soup
from dgavg.averaging.soup import uniform_soup


class Net(nn.Module):
    """Tied layers, batch norm, a complex parameter, integers, and one layer that is never used."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(3)
        self.phase = nn.Parameter(torch.randn(3, dtype=torch.complex128))
        self.unused = nn.Linear(1, 1)
        self.register_buffer("table", torch.randn(3), persistent=False)
        self.double()
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        hidden = self.norm(self.second(torch.tanh(self.first(x)))) + self.table
        return (hidden * self.phase).abs() + hidden


BATCH = (
    torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
    torch.arange(8) % 3,
)


def cross_entropy(model, batch, beta=1.0):
    return F.cross_entropy(beta * model(batch[0]), batch[1])


def nets(count=4):
    """Models that lie near each other, as runs of one initialisation do."""
    return [nearby(i) for i in range(count)]


@torch.no_grad()
def nearby(seed):
    net = Net(0)
    random = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter += 0.3 * torch.randn(parameter.shape, dtype=parameter.dtype, generator=random)
    net.norm.running_mean += seed / 10
    net.norm.num_batches_tracked += seed
    return net


def gradient_by_autograd(models, alpha, names, row, training=False):
    """dL/d(alpha) through the sum itself, buffers as constants."""
    base = Net(0).train(training)
    weights = {}
    for name in base.state_dict():
        stack = torch.stack([m.state_dict()[name] for m in models])
        share = alpha[row[name]]
        if name in names:
            weights[name] = (share.reshape(-1, *[1] * (stack.ndim - 1)) * stack).sum(dim=0)
        elif stack.is_floating_point():
            weights[name] = torch.einsum("i,i...->...", share.detach(), stack)
        else:
            weights[name] = stack[-1].clone()
    del weights["second.weight"]  # tied to the first
    out = functional_call(base, weights, (BATCH[0],))
    return F.cross_entropy(out, BATCH[1])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("by_layer", [False, True])
def test_the_gradient_of_the_coefficients_is_that_of_autograd(by_layer, training):
    models, net = nets(), Net(0).train(training)
    learner = _Learner(models, net, cross_entropy, by_layer)
    with torch.no_grad():
        learner.logits.copy_(torch.randn(learner.logits.shape, dtype=torch.float64))
    learner.backward((BATCH,), [], 0)

    logits = learner.logits.detach().clone().requires_grad_()
    names = {k for k, _ in net.named_parameters(remove_duplicate=False)}
    if by_layer:
        layers = [k.rpartition(".")[0] for k in net.state_dict()]
        assert list(learner.layers) == list(dict.fromkeys(layers))
        assert list(learner.layers) == ["", "first", "second", "norm", "unused"]
    # tied weights count with the layer that comes first
    row = {k: learner.row[{"second.weight": "first.weight"}.get(k, k)] for k in net.state_dict()}
    gradient_by_autograd(models, logits.softmax(dim=1), names, row, training).backward()
    torch.testing.assert_close(learner.logits.grad, logits.grad, rtol=1e-9, atol=1e-12)
    assert logits.grad.abs().max() > 1e-4


def test_small_differences_of_large_weights_are_seen_in_float32():
    """The products with the weights themselves, 1e4, would hide those with their differences."""
    offsets = torch.tensor([0.0, 1.0, 2.0])
    models = [{"w": torch.full((1000,), 1000.0) + 1e-3 * o} for o in offsets]
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(1000))
    learner = _Learner(models, model, lambda m, batch: m.w.sum() / 100, by_layer=False)
    learner.backward((None,), [], 0)
    exact = torch.stack([m["w"].double().sum() / 100 for m in models])
    expected = (exact - exact.mean()) / 3
    torch.testing.assert_close(learner.logits.grad[0], expected, rtol=0.02, atol=0)


def state_of(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def one(value):
    return {"w": torch.tensor([float(value)])}


class Number(nn.Module):
    def __init__(self, value=0.0):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([value]))


def square(target):
    return lambda model, batch: (model.w - target).square().sum()


def test_it_finds_the_combination_with_the_lowest_loss():
    soup = learned_soup([one(0), one(10)], Number(), square(2.5), [None] * 400)
    torch.testing.assert_close(
        soup.coefficients, torch.tensor([0.75, 0.25], dtype=torch.float64), atol=1e-3, rtol=0
    )
    assert soup.weights["w"].item() == pytest.approx(2.5, abs=1e-2)
    assert soup.temperature == 1.0


def test_a_layer_has_coefficients_of_its_own_where_asked():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Number(), Number()

    def loss(model, batch):
        return square(2.5)(model.a, None) + square(7.5)(model.b, None)

    models = [{"a.w": torch.tensor([v]), "b.w": torch.tensor([v])} for v in (0.0, 10.0)]
    soup = learned_soup(models, Two(), loss, [None] * 400, by_layer=True)
    assert list(soup.coefficients) == ["a", "b"]
    assert soup.coefficients["a"][1].item() == pytest.approx(0.25, abs=1e-3)
    assert soup.coefficients["b"][1].item() == pytest.approx(0.75, abs=1e-3)
    assert soup.weights["a.w"].item() == pytest.approx(2.5, abs=1e-2)
    assert soup.weights["b.w"].item() == pytest.approx(7.5, abs=1e-2)
    together = learned_soup(models, Two(), loss, [None] * 400)
    assert together.weights["a.w"].item() == pytest.approx(5, abs=1e-2)


def test_a_step_is_one_of_adamw_without_decay():
    models, logits = [one(0), one(4)], torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([logits], lr=0.2, weight_decay=0)
    for _ in range(3):
        optimizer.zero_grad()
        ((logits.softmax(0) * torch.tensor([0.0, 4.0])).sum() - 1).square().backward()
        optimizer.step()
    soup = learned_soup(models, Number(), square(1.0), [None] * 3, lr=0.2)
    torch.testing.assert_close(soup.coefficients, logits.softmax(0).detach(), rtol=1e-6, atol=0)


def test_the_first_step_moves_the_logits_by_the_papers_rate():
    soup = learned_soup([one(0), one(10)], Number(), square(2.5), [None])
    expected = torch.tensor([0.05, -0.05], dtype=torch.float64).softmax(dim=0)
    torch.testing.assert_close(soup.coefficients, expected)


def test_a_temperature_is_learned_along_where_asked():
    torch.manual_seed(0)
    x, y = torch.randn(64, 3), torch.randint(0, 2, (64,))  # labels are noise: small logits pay
    models = [nn.Linear(3, 2) for _ in range(2)]

    def loss(model, batch, beta):
        return F.cross_entropy(beta * model(x), y)

    soup = learned_soup(models, nn.Linear(3, 2), loss, [None] * 20, temperature=True)
    assert 0 < soup.temperature < 0.6
    with pytest.raises(TypeError):
        learned_soup(models, nn.Linear(3, 2), loss, [None])  # no beta where none was asked for


def test_without_steps_that_matter_it_is_the_uniform_soup():
    models = nets()
    soup = learned_soup(models, Net(0).eval(), cross_entropy, [BATCH], lr=0.0)
    assert soup.coefficients.tolist() == [0.25] * 4
    for name, tensor in uniform_soup(models).items():
        torch.testing.assert_close(soup.weights[name], tensor, msg=name)
    assert soup.weights["first.weight"].data_ptr() == soup.weights["second.weight"].data_ptr()


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_that_lends_its_structure_is_as_before(fails):
    net, models = Net(0).train(), nets()
    before, states = state_of(net), [state_of(m) for m in models]
    parameters = dict(net.named_parameters(remove_duplicate=False))
    seen = []

    def loss(model, batch):
        seen.append(model.first.weight.detach().clone())
        assert model.second.weight is model.first.weight
        if fails and len(seen) == 2:
            raise KeyError("stop")
        return cross_entropy(model, batch)

    if fails:
        with pytest.raises(KeyError, match="stop"):
            learned_soup(models, net, loss, [BATCH] * 3)
    else:
        learned_soup(models, net, loss, [BATCH] * 3)
        assert len(seen) == 3
    assert not seen[0].equal(before["first.weight"])  # it did have others meanwhile
    assert dict(net.named_parameters(remove_duplicate=False)) == parameters  # the same objects
    assert net.second.weight is net.first.weight
    assert all(p.grad is None and p.requires_grad for p in parameters.values())
    assert net.training
    for state, old in zip([net.state_dict(), *(m.state_dict() for m in models)],
                          [before, *states], strict=True):  # fmt: skip
        assert all(state[k].equal(old[k]) for k in old)


def test_wrapped_and_frozen_models_work():
    models = [nn.Linear(2, 1, bias=False) for _ in range(2)]
    for value, model in enumerate(models):
        nn.init.constant_(model.weight, float(value))
        model.requires_grad_(False)
    x = torch.ones(1, 2)
    soup = learned_soup(
        models, nn.DataParallel(models[0]), lambda m, b: (m(x) - 0.5).square().sum(), [None] * 300
    )
    assert soup.coefficients[1].item() == pytest.approx(0.25, abs=1e-3)
    assert list(soup.weights) == ["weight"]
    assert models[0].weight.tolist() == [[0.0, 0.0]]


def test_it_works_where_gradients_are_off():
    with torch.no_grad():
        soup = learned_soup([one(0), one(10)], Number(), square(2.5), [None] * 5)
        assert not torch.is_grad_enabled()
    assert soup.coefficients[0] > 0.5
    assert not soup.weights["w"].requires_grad
    assert not soup.coefficients.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_holds_the_combination_its_gradient_and_one_model(dtype):
    size, parts, loads = 20_000, 10, []

    class Bulk(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ParameterList(torch.zeros(size, dtype=dtype) for _ in range(parts))

    def load(i):
        loads.append(i)
        return {f"parts.{k}": torch.full((size,), float(i), dtype=dtype) for k in range(parts)}

    def loss(model, batch):
        return torch.stack([p[0].float() for p in model.parts]).sum()

    model = Bulk()
    with LiveBytes() as memory:
        learned_soup([lambda i=i: load(i) for i in range(4)], model, loss, [None] * 2)
    one_model = parts * size * torch.empty(0, dtype=dtype).element_size()
    combination = max(parts * size * 4, 2 * one_model)  # in float32, or the weights and gradient
    assert memory.peak <= combination + one_model + 8 * size * 4
    assert len(loads) == 1 + 2 * 2 * 4 + 4


@pytest.mark.parametrize(
    ("models", "loss", "batches", "message"),
    [
        ([], square(0.0), [None], "no models"),
        ([one(0)], square(0.0), [], "no batch came"),
        ([{"v": torch.ones(1)}], square(0.0), [None], r"models\[0\] and model differ: .*missing"),
        ([one(0), {"w": torch.ones(2)}], square(0.0), [None], r"models\[1\] and models\[0\] diff"),
        ([one(0)], lambda m, b: m.w * torch.nan, [None], "the loss of batch 0 is nan"),
        ([one(0)], lambda m, b: m.w / b, [1.0, 1.0, 0.0], "the loss of batch 2 is nan"),
        ([one(0)], lambda m, b: torch.ones(()), [None], "depends on the weights of the model"),
        ([one(0)], lambda m, b: m.w.expand(2), [None], "must be one number"),
        ([one(0)], lambda m, b: 1.0, [None], "must be one number"),
    ],
)
def test_what_cannot_be_learned_is_refused(models, loss, batches, message):
    with pytest.raises(ValueError, match=message):
        learned_soup(models, Number(), loss, batches)
