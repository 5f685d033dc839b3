"""What holds for every average, whatever the weights: order, equality, gating, state."""

from __future__ import annotations

import copy
import inspect
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dgavg import averaging
from dgavg.averaging import ExponentialMean, LatestMean, RunningMean, WeightAverage

few = settings(max_examples=15, deadline=None, derandomize=True, database=None)

KINDS = {
    "RunningMean": RunningMean,
    "first_count": partial(RunningMean, first_count=3),
    "ExponentialMean": partial(ExponentialMean, decay=0.7),
    "bias_correction": partial(ExponentialMean, decay=0.7, bias_correction=True),
    "half_life": partial(ExponentialMean, half_life=3),
    **{
        warmup: partial(ExponentialMean, decay=0.9, warmup=warmup)
        for warmup in ("power", "count", "annealing", "exponential")
    },
    "LatestMean": partial(LatestMean, k=3),
}
EVERY = KINDS | {
    name: kind
    for name, kind in vars(averaging).items()
    if inspect.isclass(kind) and issubclass(kind, WeightAverage) and not inspect.isabstract(kind)
}


def has_gate(kind):
    """Not where a metric decides what counts."""
    parameters = inspect.signature(kind).parameters.values()
    return any(p.name == "start" or p.kind is p.VAR_KEYWORD for p in parameters)


floats = st.floats(-1e3, 1e3, width=32)
states = st.lists(st.lists(floats, min_size=7, max_size=7), min_size=1, max_size=7)
gates = st.tuples(st.integers(0, 4), st.integers(1, 3))


class Net(nn.Module):
    """Two parameters of 6 numbers and a buffer of one."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))
        self.register_buffer("c", torch.zeros(1))
        self.register_buffer("n", torch.tensor(0))


@torch.no_grad()
def put(model, row):
    values = torch.tensor(row)
    model.a.copy_(values[:4].view(2, 2))
    model.b.copy_(values[4:6])
    model.c.copy_(values[6:])
    model.n.add_(1)


def feed(make, rows, **options):
    """An average that has seen all rows, and its model."""
    model = Net()
    average = make(model, **options)
    for row in rows:
        put(model, row)
        average.update(model)
    return average, model


def close(one, other, tolerance=1e-2):
    return all(torch.allclose(one[k], other[k], rtol=1e-5, atol=tolerance) for k in one)


def equal(one, other):
    return list(one) == list(other) and all(one[k].equal(other[k]) for k in one)


@few
@given(states, st.randoms(use_true_random=False), st.sampled_from(["copy", "average"]))
def test_a_uniform_mean_does_not_depend_on_the_order(rows, random, buffers):
    shuffled = random.sample(rows, len(rows))
    one, _ = feed(RunningMean, rows, buffers="average")
    other, _ = feed(RunningMean, shuffled, buffers="average")
    assert close(one.weights(), other.weights())
    one, _ = feed(LatestMean, rows, k=7, buffers=buffers)
    other, _ = feed(RunningMean, rows, buffers=buffers)
    assert close(one.weights(), other.weights())


@pytest.mark.parametrize("kind", KINDS)
@few
@given(row=st.lists(floats, min_size=7, max_size=7), n=st.integers(1, 9), buffers=st.booleans())
def test_an_average_of_equal_models_is_that_model_to_the_bit(kind, row, n, buffers):
    average, model = feed(KINDS[kind], [row] * n, buffers="average" if buffers else "copy")
    assert equal(average.weights(), dict(model.state_dict()))


@pytest.mark.parametrize("kind", KINDS)
@few
@given(rows=states)
def test_an_average_lies_between_the_weights_it_has_seen(kind, rows):
    average, _ = feed(KINDS[kind], rows, buffers="average")
    for i, name in enumerate(("b", "c")):
        seen = torch.tensor(rows)[:, 4 + 2 * i : 6 + i]
        found = average.weights()[name]
        assert (found >= seen.min(dim=0).values - 1e-3).all()
        assert (found <= seen.max(dim=0).values + 1e-3).all()


@pytest.mark.parametrize("kind", ["RunningMean", "first_count", "ExponentialMean", "LatestMean"])
@few
@given(rows=states, gate=gates)
def test_start_and_interval_are_the_same_as_updating_by_hand(kind, rows, gate):
    start, interval = gate
    gated, _ = feed(KINDS[kind], rows, start=start, interval=interval)
    chosen = range(start, len(rows), interval)
    assert (gated.calls, gated.count) == (len(rows), len(chosen))
    if chosen:
        plain, _ = feed(KINDS[kind], [rows[i] for i in chosen])
        names = ["a", "b", "c"]  # the counter counts rows
        assert equal(*({k: a.weights()[k] for k in names} for a in (gated, plain)))


@pytest.mark.parametrize("kind", EVERY)
@few
@given(rows=states)
def test_device_source_and_copies_make_no_difference(kind, rows):
    plain, model = feed(EVERY[kind], rows)
    there, _ = feed(EVERY[kind], rows, device="cpu")
    assert equal(plain.weights(), there.weights())
    weights = plain.weights()
    twin = copy.deepcopy(plain)
    put(model, rows[0])
    twin.update(model)
    plain.update(model)
    assert equal(twin.weights(), plain.weights())
    assert list(weights) == list(model.state_dict())


@pytest.mark.parametrize("kind", EVERY)
@few
@given(rows=states, split=st.integers(0, 6), gate=gates)
def test_a_state_goes_on_to_the_bit_from_anywhere(kind, rows, split, gate):
    """Also from before the first update that counts, and into an average that was used."""
    options = {"start": gate[0], "interval": gate[1]} if has_gate(EVERY[kind]) else {}
    straight, model = feed(EVERY[kind], rows[:split], **options)
    saved = copy.deepcopy(straight.state_dict())
    for resumed in (EVERY[kind](Net(), **options), feed(EVERY[kind], rows, **options)[0]):
        twin = copy.deepcopy(model)
        expected = copy.deepcopy(straight)
        resumed.load_state_dict(saved)
        for row in rows[split:]:
            put(twin, row)
            resumed.update(twin)
            expected.update(twin)
        assert (resumed.calls, resumed.count) == (expected.calls, expected.count)
        if expected.count:
            assert equal(resumed.weights(), expected.weights())


@pytest.mark.parametrize("kind", EVERY)
@few
@given(rows=states, before=states)
def test_after_a_restart_nothing_of_the_past_is_left(kind, rows, before):
    used, model = feed(EVERY[kind], before)
    used.restart()
    fresh = EVERY[kind](Net())
    for row in rows:
        put(model, row)
        used.update(model)
        fresh.update(model)
    assert equal(used.weights(), fresh.weights())
