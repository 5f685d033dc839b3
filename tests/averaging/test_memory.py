"""Averages take the memory that their docstrings say, in construction, update and use."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from live_bytes import LiveBytes
from torch import nn

from dgavg import averaging
from dgavg.averaging import (
    ExponentialMean,
    LatestMean,
    RunningMean,
    WeightAverage,
    flatten_parameters,
)
from dgavg.averaging.convex import ConvexMean
from dgavg.averaging.flat import zeros

PACK, CHUNK = 1 << 12, 1 << 15  # numbers; as those of dgavg, in proportion to the model
SLACK = 4 * PACK + 4096  # what is gathered at once, and rounding up to where tensors start


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    monkeypatch.setattr("dgavg.averaging.pairs.PACK", PACK)
    monkeypatch.setattr("dgavg.averaging.pairs.CHUNK", CHUNK)


def model_of(dtype=torch.float32):
    """0.2 million numbers in three large tensors, a few small ones and buffers."""
    layers = (nn.Linear(256, 256, dtype=dtype) for _ in range(3))
    return nn.Sequential(*layers, nn.BatchNorm1d(256, dtype=dtype))


def size(model):
    return sum(t.nbytes for t in [*model.parameters(), *model.buffers()])


def wide(model):
    """Bytes of the parameters in float32 and of the buffers as they are."""
    parameters = sum(4 * p.numel() for p in model.parameters())
    return parameters + sum(b.nbytes for b in model.buffers())


def taken(work):
    """The most bytes that tensors made by `work` held at once, those still held, and its result."""
    with LiveBytes() as memory:
        found = work()
    return memory.peak, sum(memory.live.values()), found


def near(found, expected, slack=SLACK):
    return expected <= found <= expected + slack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("kind", [RunningMean, ExponentialMean])
def test_convex_means_hold_one_model_in_float32(kind, flat, dtype):
    model = model_of(dtype)
    if flat:
        flatten_parameters(model)
    peak, held, average = taken(lambda: kind(model))
    assert near(peak, wide(model))
    assert near(held, wide(model))
    converted = 0 if dtype == torch.float32 else 4 * CHUNK
    for _ in range(3):
        peak, held, _ = taken(lambda: average.update(model))
        assert peak <= SLACK + converted
        assert held <= SLACK
    peak, _, weights = taken(lambda: average.weights())
    narrow = sum(p.nbytes for p in model.parameters())
    assert near(peak, 0 if dtype == torch.float32 else narrow, slack=0)
    peak, held, _ = taken(lambda: average.copy_to(model))
    assert peak == held == 0
    del weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 3])
def test_latest_mean_holds_k_models_and_one_in_float32_to_give_weights(k, dtype):
    model = model_of(dtype)
    buffers = sum(b.nbytes for b in model.buffers())
    kept = k * (size(model) - buffers) + buffers
    peak, held, average = taken(lambda: LatestMean(model, k=k))
    assert near(peak, kept)
    assert near(held, kept)
    for _ in range(k + 1):
        peak, _, _ = taken(lambda: average.update(model))
        assert peak <= SLACK
    peak, held, weights = taken(lambda: average.weights())
    narrow = 0 if dtype == torch.float32 else size(model)
    largest = max(4 * p.numel() for p in model.parameters())
    assert peak <= wide(model) + max(narrow, largest) + SLACK
    assert held <= max(wide(model), narrow) + SLACK
    del weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [RunningMean, LatestMean])
def test_a_swap_takes_one_more_model_in_the_block_and_none_after(kind, dtype):
    model = model_of(dtype)
    average = kind(model)
    average.update(model)
    extra = wide(model) + size(model) if kind is LatestMean else 0  # its mean is made on the way

    def swap():
        with average.applied_to(model):
            inside.append(sum(memory.live.values()))

    inside = []
    with LiveBytes() as memory:
        swap()
    assert near(inside[0], size(model))
    assert memory.peak <= size(model) + extra + SLACK
    assert sum(memory.live.values()) == 0


def test_flattening_takes_one_more_model_while_it_moves():
    model = model_of()
    parameters = sum(p.nbytes for p in model.parameters())
    peak, held, _ = taken(lambda: flatten_parameters(model))
    assert near(peak, parameters)
    assert near(held, parameters)  # in place of those that the model had


def test_neither_the_model_nor_its_average_is_copied_by_a_saved_state():
    model = model_of()
    average = RunningMean(model)
    average.update(model)
    peak, _, _ = taken(lambda: average.load_state_dict(average.state_dict()))
    assert peak == 0


def test_what_is_counted():
    one, other = torch.ones(1000), torch.ones(1000)
    taken_by_sum, _, _ = taken(lambda: torch.add(one, other))
    assert taken_by_sum == 4000
    assert taken(lambda: torch.add(one, other, out=other))[0] == 0
    assert taken(lambda: torch.where(one > 0, one, other, out=other))[0] == 1000
    peak, held, found = taken(lambda: zeros([1 << 20, 1 << 19], torch.float32, one.device)[1])
    assert (peak, held) == (6 << 20, 2 << 20)
    assert len(found) == 1 << 19
    before = torch.frombuffer
    with LiveBytes():
        pass
    assert torch.frombuffer is before


def test_every_average_says_what_memory_it_takes():
    kinds = {k: v for k, v in vars(averaging).items() if inspect.isclass(v)}
    for name, kind in kinds.items():
        if issubclass(kind, WeightAverage) and not inspect.isabstract(kind):
            documented = " ".join(k.__doc__ or "" for k in kind.__mro__ if k is not object)
            assert "Memory:" in documented or "memory:" in documented, name
            for other in re.findall(r"memory: see `(\w+)`", documented):
                assert "Memory:" in getattr(averaging, other, ConvexMean).__doc__, name
