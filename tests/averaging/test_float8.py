"""Models with parameters of eight bits, which torch neither promotes nor compares."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from trajectories import wander

from dgavg.averaging import (
    ExponentialMean,
    GaussianPosterior,
    LatestMean,
    LossValley,
    PostHocMean,
    RunningMean,
    ValidatedMean,
    WeightSubspace,
    average_parameters,
    copy_parameters,
    ensemble,
    interpolate,
    uniform_soup,
)
from dgavg.averaging.parameters import common, same_values, wide

EIGHT = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
KINDS = [RunningMean, LatestMean, GaussianPosterior, WeightSubspace, ValidatedMean, LossValley]


def quarters(dtype, seed=0, large=False):
    """A layer whose numbers are exact in eight bits."""
    model = nn.Linear(70, 50) if large else nn.Linear(3, 2)
    random = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = torch.randint(-8, 8, p.shape, generator=random).div(4).to(dtype)
    return model


@pytest.mark.parametrize("dtype", EIGHT)
def test_what_holds_both(dtype):
    assert wide(dtype) == torch.float32
    assert common(dtype, dtype) == dtype
    assert common(dtype, torch.float32) == common(torch.float16, dtype) == torch.float32
    assert common(torch.float64, dtype) == torch.float64
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    for other in (torch.bfloat16, EIGHT[EIGHT.index(dtype) - 1]):
        found = every.to(common(dtype, other)).float()
        torch.testing.assert_close(found, every.float(), rtol=0, atol=0, equal_nan=True)


def test_wider_numbers_are_summed_as_before():
    assert [wide(t) for t in (torch.bfloat16, torch.float16)] == [torch.float32] * 2
    assert (wide(torch.float64), wide(torch.complex64)) == (torch.float64, torch.complex64)
    assert common(torch.uint8, torch.int8) == torch.int16


@pytest.mark.parametrize("dtype", EIGHT)
def test_equal_numbers(dtype):
    one = quarters(dtype).weight.detach()
    assert same_values(one, one.clone())
    assert same_values(one.float(), one)
    assert not same_values(one, quarters(dtype, 1).weight)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("dtype", EIGHT)
@pytest.mark.parametrize("kind", KINDS)
def test_averages_of_eight_bits_are_those_of_the_same_numbers_in_more(kind, dtype, large):
    model = quarters(dtype, large=large)
    plain = nn.Linear(*reversed(model.weight.shape))
    average, expected = kind(model), kind(plain)
    for seed in range(4):
        for p, q, n in zip(
            model.parameters(),
            plain.parameters(),
            quarters(dtype, seed, large).parameters(),
            strict=True,
        ):
            p.data.copy_(n)
            q.data.copy_(n)
        average.update(model)
        expected.update(plain)
    for name, tensor in average.weights().items():
        assert tensor.dtype == dtype
        assert tensor.float().equal(expected.weights()[name].to(dtype).float())
    model.float()
    average.update(model)  # follows into more bits
    expected.update(plain)
    assert average.weights()["bias"].equal(expected.weights()["bias"])
    average.copy_to(quarters(dtype, large=large))


def test_an_exponential_mean_moves_by_less_than_eight_bits_can_tell():
    model = {"w": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    average = ExponentialMean(model, decay=0.999)
    average.update(model)
    model["w"].fill_(1.0)
    for _ in range(1000):
        average.update(model)
    expected = torch.full((2,), 1 - 0.999**1000)
    torch.testing.assert_close(average.state_dict()["tensors"]["w"], expected, rtol=1e-4, atol=0)


def test_a_tied_weight_of_eight_bits_may_come_as_two_copies():
    model = nn.Sequential(quarters(EIGHT[0]), quarters(EIGHT[0]))
    model[1].weight = model[0].weight
    average = RunningMean(model)
    state = copy.deepcopy({k: v.clone() for k, v in model.state_dict().items()})
    average.update(state)
    uniform_soup([model, state])
    wander(model[0].float(), 1)
    state["1.weight"] = quarters(EIGHT[0], 5).weight.detach()
    with pytest.raises(ValueError, match="were tied but now differ"):
        average.update(state)
    with pytest.raises(ValueError, match="are tied in the latter"):
        uniform_soup([nn.ModuleList([model[0], model[0]]), state])


@pytest.mark.parametrize("dtype", EIGHT)
def test_soups_and_other_sums(dtype):
    models = [quarters(dtype, seed) for seed in range(2)]
    mean = (models[0].weight.float() + models[1].weight.float()) / 2
    for found in (uniform_soup(models), interpolate(*models, 0.5)):
        assert found["weight"].float().equal(mean.to(dtype).float())
    total = ensemble(models, lambda weights: weights["weight"])
    assert total.equal(mean * 2)
    averages = copy_parameters(models[0])
    average_parameters(models[1], averages)
    assert averages["weight"].equal(mean)
    post = PostHocMean(models[0], lengths=[0.1], snapshot_every=1)
    post.update(models[0])
    assert post.weights(0.1)["weight"].float().equal(models[0].weight.float())
