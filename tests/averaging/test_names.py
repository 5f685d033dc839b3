"""Which entries of a model an average takes, and by which names: wrappers, extra state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from trajectories import assert_same, snapshot, wander

from dgavg.averaging import (
    GaussianPosterior,
    RunningMean,
    SubspaceSGD,
    WeightSubspace,
    copy_parameters,
    greedy_soup,
    learned_soup,
    named_tensors,
    uniform_soup,
)
from dgavg.averaging.parameters import plain_names


class Wrapped(nn.Module):
    """What DataParallel and DistributedDataParallel do to names."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


class Host(nn.Module):
    """A child of its own that is called `module`, with all parameters, beside one with buffers."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2, affine=False)
        self.register_buffer("hidden", torch.zeros(2), persistent=False)

    def forward(self, x):
        return self.norm(self.module(x)) + self.hidden


class Unsaved(nn.Module):
    """All that a state dict holds is in `module`."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(2, 2)
        self.register_buffer("hidden", torch.zeros(2), persistent=False)


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPS = [lambda m: m, Wrapped, compiled, lambda m: Wrapped(Wrapped(compiled(m)))]


@pytest.mark.parametrize(
    ("names", "plain"),
    [
        (["module.a", "module.b.c"], ["a", "b.c"]),
        (["module.a", "b"], ["module.a", "b"]),
        (["module.module.a", "module.b"], ["module.a", "b"]),
        (["_orig_mod.module.a", "_orig_mod.b"], ["module.a", "b"]),
        (["module._orig_mod.module.a"], ["a"]),
        ([], []),
    ],
)
def test_module_goes_where_every_name_has_it(names, plain):
    assert plain_names(names) == dict(zip(names, plain, strict=True))


@pytest.mark.parametrize("kind", [Host, Unsaved])
@pytest.mark.parametrize("wrap", WRAPS)
def test_a_child_called_module_keeps_its_name(wrap, kind):
    model = kind()
    wrapped = wrap(model)
    average = RunningMean(wrapped)
    for step in range(2):
        wander(model, step)
        average.update(wrapped)
    assert list(average.weights()) == list(named_tensors(wrapped)) == list(model.state_dict())
    model.load_state_dict(average.weights())
    assert sorted(average.tracked.averaged) == ["module.bias", "module.weight"]
    average.update(model)  # and without the wrapper
    copied = list(copy_parameters(wrapped))
    assert copied == ["module.weight", "module.bias"]
    assert copy_parameters(wrapped, {"module.weight": 1.0}) == {
        "module.weight": True,
        "module.bias": False,
    }


def test_names_of_buffers_may_have_the_prefixes_of_wrappers():
    model = Host()
    state = snapshot(model)
    for wrap in ("", "module."):
        names = frozenset(f"{wrap}{k}" for k in state if "norm" in k)
        for kind in (RunningMean, WeightSubspace, GaussianPosterior):
            average = kind(state, buffer_names=names, buffers="copy")
            assert sorted(average.tracked.averaged) == ["module.bias", "module.weight"]


@pytest.mark.parametrize("wrap", WRAPS)
def test_a_subspace_finds_the_gradients_of_a_child_called_module(wrap):
    model = Host()
    wrapped = wrap(model)
    subspace = WeightSubspace(wrapped, k=3)
    for step in range(3):
        wander(model, step)
        subspace.update(wrapped)
    wrapped(torch.randn(4, 2)).square().sum().backward()
    expected = subspace.project({k: p.grad for k, p in model.named_parameters()})
    assert expected.any()
    assert subspace.project(wrapped).equal(expected)
    prefixed = {f"module.{k}": p.grad for k, p in model.named_parameters()}
    assert subspace.project(prefixed).equal(expected)
    SubspaceSGD(subspace, lr=0.1).step(wrapped)


@pytest.mark.parametrize("wrap", WRAPS[:2])
def test_soups_of_models_with_a_child_called_module(wrap):
    models = [Host(), Host()]
    soup = uniform_soup(map(wrap, models))
    models[0].load_state_dict(soup)
    model = wrap(copy.deepcopy(models[1]))
    found = learned_soup(models, model, lambda m, x: m(x).square().mean(), [torch.randn(4, 2)] * 2)
    models[0].load_state_dict(found.weights)


class Extra(nn.Linear):
    """Keeps `extra` in its state dict, whatever it is."""

    def __init__(self, extra):
        super().__init__(2, 2)
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, extra):
        self.extra = extra


EXTRAS = [{"scale": 2.0}, None, "text", torch.ones(3), torch.arange(2)]


@pytest.mark.parametrize("extra", EXTRAS)
def test_extra_state_is_left_alone(extra):
    model = nn.Sequential(Extra(extra), nn.BatchNorm1d(2))
    average, mapped = RunningMean(model), RunningMean(model.state_dict(), buffers="average")
    for step in range(3):
        wander(model, step)
        average.update(model.state_dict() if step == 1 else model)
        mapped.update(model.state_dict())
    assert list(average.weights()) == list(mapped.weights()) == list(named_tensors(model))
    assert "0._extra_state" not in average.weights()
    assert average.weights()["0.weight"].equal(mapped.weights()["0.weight"])
    state = model.state_dict()
    average.copy_to(state)
    average.copy_to(model)
    with average.applied_to(model):
        assert model[0].extra is extra
    assert model[0].extra is extra
    left = model.load_state_dict(average.weights(), strict=False)
    assert (left.missing_keys, left.unexpected_keys) == (["0._extra_state"], [])


@pytest.mark.parametrize("extra", EXTRAS)
def test_soups_leave_extra_state_out(extra):
    models = [Extra(extra), Extra(extra)]
    for sources in (models, [m.state_dict() for m in models]):
        soup = uniform_soup(sources)
        assert list(soup) == ["weight", "bias"]
        assert_same(greedy_soup(sources, lambda w: 0.0, ties=True).weights, soup)


@pytest.mark.parametrize("use", [RunningMean, lambda source: uniform_soup([source])])
def test_what_holds_no_tensors_is_no_state_dict(use):
    with pytest.raises(ValueError, match="no tensors, rate is float: give a state dict"):
        use({"rate": 0.5, "epoch": 3})
