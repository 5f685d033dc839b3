"""Tensors side by side: flattened models, what stands next to what, pairs moved by few calls."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional
from trajectories import assert_same, small_net, snapshot, walk, wander

from dgavg.averaging import ExponentialMean, RunningMean, flatten_parameters
from dgavg.averaging.flat import as_one, groups, is_dense, runs, side_by_side
from dgavg.averaging.pairs import CHUNK, PACK, SMALL, Pairs, moved, room

CPU = torch.device("cpu")


def flat_net():
    model = small_net()
    flatten_parameters(model)
    return model


def one_buffer(tensors):
    return len({t.untyped_storage().data_ptr() for t in tensors}) == 1


def calls_on(average):
    """How many tensors one update moves."""
    pairs = average._seen
    lists = [targets for targets, _ in (*pairs._alike, *pairs._converted)]
    return sum(map(len, lists)) + len(pairs._packs)


@pytest.mark.parametrize(
    ("tensor", "dense"),
    [
        (torch.zeros(2, 3, 4), True),
        (torch.zeros(2, 3, 4).permute(2, 0, 1), True),
        (torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last), True),
        (torch.zeros(()), True),
        (torch.zeros(0, 3), True),
        (torch.zeros(1, 5)[:, ::1], True),
        (torch.zeros(6)[::2], False),
        (torch.zeros(3, 1).expand(3, 4), False),
        (torch.zeros(3, 4)[:, :2], False),
        (torch.zeros(4, 4).as_strided((2, 2), (1, 1)), False),
    ],
)
def test_tensors_without_gaps_in_memory(tensor, dense):
    assert is_dense(tensor) is dense


def test_flattening_changes_no_value_and_no_object():
    model = small_net()
    model[0].to(memory_format=torch.channels_last)
    model[4].double()
    model[3].bias.requires_grad_(False)
    before, parameters = snapshot(model), list(model.parameters())
    strides = [p.stride() for p in parameters]
    flatten_parameters(model)
    assert_same(snapshot(model), before, rtol=0)
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert [p.stride() for p in model.parameters()] == strides
    assert one_buffer([*model[0].parameters(), *model[1].parameters(), *model[3].parameters()])
    assert one_buffer(model[4].parameters())


def test_flattening_keeps_ties_by_object_and_by_memory():
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3)))
    model[1].weight = model[0].weight
    model[2].weight.data = model[0].weight.data
    flatten_parameters(model)
    nn.init.constant_(model[0].weight, 5.0)
    assert model[1].weight is model[0].weight
    assert model[2].weight.unique().tolist() == [5.0]


def test_flattening_a_model_without_shapes_is_refused():
    with pytest.raises(ValueError, match="weight has no shape yet: run one batch"):
        flatten_parameters(nn.LazyLinear(2))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_training_goes_on_as_before_to_the_bit(kind):
    ends = []
    for flat in (False, True):
        model = small_net()
        optimizer = kind(model.parameters(), lr=0.01)
        for step in range(6):
            if flat and step == 2:
                flatten_parameters(model)
            optimizer.zero_grad()
            x = torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(step))
            functional.cross_entropy(model(x), torch.arange(4) % 3).backward()
            optimizer.step()
        model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})
        assert one_buffer(model.parameters()) is flat
        ends.append(snapshot(model))
    assert_same(*ends, rtol=0)


@pytest.mark.parametrize("buffers", ["copy", "average"])
@pytest.mark.parametrize("when", ["before", "after", "in between"])
def test_an_average_of_a_flat_model_is_one_vector_and_the_same_bits(when, buffers):
    model, plain = small_net(), small_net()
    if when == "before":
        flatten_parameters(model)
    average = RunningMean(model, buffers=buffers)
    expected = RunningMean(plain, buffers=buffers)
    if when == "after":
        flatten_parameters(model)
    for step in walk(model, 5):
        if when == "in between" and step == 3:
            flatten_parameters(model)
        wander(plain, step)
        average.update(model)
        expected.update(plain)
    assert calls_on(average) == (1 if buffers == "copy" else 2)  # and one for the buffers
    whole = sum(p.numel() for p in model.parameters())
    assert [len(t) >= whole for t in average._seen._alike[0][0]] == [True]
    assert [len(t) >= whole for t in expected._seen._alike[0][0]] == [False]
    assert_same(average.weights(), expected.weights(), rtol=0)


@pytest.mark.parametrize("move", [nn.Module.double, copy.deepcopy])
def test_a_flat_model_that_was_moved_is_followed_as_a_list(move):
    model = flat_net()
    average, seen = RunningMean(model), []
    for _ in walk(model, 2):
        average.update(model)
        seen.append(snapshot(model)["3.weight"].double())
    model = move(model)
    wander(model, 3)
    average.update(model)
    seen.append(snapshot(model)["3.weight"].double())
    assert calls_on(average) > 1
    mean = torch.stack(seen).mean(dim=0)
    torch.testing.assert_close(average.weights()["3.weight"].double(), mean, rtol=1e-5, atol=1e-5)


def test_a_flat_bfloat16_model_is_converted_in_chunks():
    model = nn.Linear(CHUNK // 1000, 2500, bias=False, dtype=torch.bfloat16)
    model.more = nn.Linear(30, 30, dtype=torch.bfloat16)
    flatten_parameters(model)
    average = ExponentialMean(model, decay=0.5)
    for value in (1.0, 3.0):
        nn.init.constant_(model.weight, value)
        nn.init.constant_(model.more.weight, value)
        average.update(model)
    assert [sum(map(torch.numel, t)) <= CHUNK for t, _ in average._seen._converted] == [True] * 3
    assert average.weights()["weight"].unique().tolist() == [2.0]
    assert average.weights()["more.weight"].unique().tolist() == [2.0]


def test_saving_a_flat_model_and_its_average_writes_each_once():
    model = nn.Sequential(*(nn.Linear(50, 50) for _ in range(10)))
    flatten_parameters(model)
    average = RunningMean(model)
    average.update(model)
    for state in (model.state_dict(), average.state_dict(), average.weights()):
        file = io.BytesIO()
        torch.save(state, file)
        assert file.tell() < 1.3 * 4 * 10 * 2550


def test_runs_are_found_in_any_order_and_with_others_between():
    a, b, c, d = side_by_side([torch.zeros(3), torch.zeros(64), torch.zeros(2), torch.zeros(5)],
                              torch.float32, CPU)  # fmt: skip
    other = torch.zeros(3)
    assert runs([c, other, b, d, a]) == [[1], [4, 2, 0, 3]]
    assert runs([a, c]) == [[0], [1]]
    assert groups([a, b, other, c, d]) == [[0, 1], [2], [3, 4]]
    assert groups([b, a]) == [[0], [1]]
    assert groups([a, b.view(torch.int32)]) == [[0], [1]]
    assert groups([]) == runs([]) == []
    assert as_one([a, b]).shape == (128,)
    as_one([a, b, c, d]).fill_(1)
    assert all(t.eq(1).all() for t in (a, b, c, d))


def mixed_tensors(dtype=torch.float32):
    """Small and large, in many layouts."""
    shapes = [(3,), (5, 7), (SMALL + 1,), (), (0,), (40, 60), (2, 3, 4, 5), (SMALL,)]
    random = torch.Generator().manual_seed(0)
    found = [torch.randn(shape, generator=random).to(dtype) for shape in shapes]
    found.append(found[5].clone().t())
    found.append(found[6].clone().to(memory_format=torch.channels_last))
    found.append(torch.randn(6, 6, generator=random).to(dtype)[:, ::2])
    found += [torch.randn(SMALL, generator=random).to(dtype) for _ in range(PACK // SMALL)]
    return found


@pytest.mark.parametrize("source", [torch.float32, torch.float64, torch.bfloat16])
def test_pairs_copy_and_lerp_as_single_tensors_do(source):
    sources = [*mixed_tensors(source), torch.arange(3.0)]
    targets = room(sources, [torch.float32] * len(sources), [CPU] * len(sources))
    pairs = Pairs(targets, sources)
    pairs.copy()
    for target, tensor in zip(targets, sources, strict=True):
        assert target.equal(tensor.to(target.dtype))
    for tensor in sources:
        tensor.mul_(-2).add_(1)
    expected = [t.lerp(s.to(t.dtype), 0.3) for t, s in zip(targets, sources, strict=True)]
    pairs.lerp(0.3)
    for target, tensor in zip(targets, expected, strict=True):
        assert target.equal(tensor)
    assert len(pairs._packs) == 2


def test_pairs_of_targets_that_stand_anywhere():
    sources = mixed_tensors()
    targets = [torch.zeros_like(t) for t in sources]
    Pairs(targets, sources).copy()
    assert all(t.equal(s) for t, s in zip(targets, sources, strict=True))


def test_pairs_with_the_same_gaps_on_both_sides():
    target, source = torch.zeros(6)[::2], torch.arange(6.0).double()[::2]
    Pairs([target], [source]).lerp(0.5)
    assert target.tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("align", [1, 64])
@pytest.mark.parametrize("where", ["anywhere", "side by side", "transposed", "in another order"])
def test_pairs_of_neighbours_whose_targets_are_no_such_neighbours(where, align):
    like = [torch.zeros(4, 16), torch.zeros(8, 8), torch.zeros(2, 64)]
    sources = side_by_side(like, torch.float32, CPU, align)
    for i, source in enumerate(sources):
        source.copy_(torch.arange(1.0, source.numel() + 1).view_as(source) + 1000 * i)
    if where == "anywhere":
        targets = [torch.zeros_like(t) for t in like]
    elif where == "side by side":
        targets = side_by_side(like, torch.float32, CPU, align)
    elif where == "transposed":
        targets = side_by_side([t.t().contiguous().t() for t in like], torch.float32, CPU, align)
    else:
        targets = side_by_side(like[::-1], torch.float32, CPU, align)[::-1]
    pairs = Pairs(targets, sources)
    pairs.lerp(0.5)
    assert all(t.equal(s / 2) for t, s in zip(targets, sources, strict=True))
    pairs.copy()
    assert all(t.equal(s) for t, s in zip(targets, sources, strict=True))


def test_what_fits_stays_and_what_does_not_is_laid_out_anew():
    like = [torch.randn(3, 4, 5, 6), torch.randn(3)]
    floats, here = [torch.float32] * 2, [CPU] * 2
    held = room(like, floats, here)
    for tensor, other in zip(held, like, strict=True):
        tensor.copy_(other)
    assert moved(held, like, floats, here) is held
    last = [like[0].to(memory_format=torch.channels_last), like[1]]
    found = moved(held, last, floats, here)
    assert found[0].stride() == last[0].stride() != held[0].stride()
    assert all(t.equal(s) for t, s in zip(found, like, strict=True))
    assert moved(held, like, [torch.float64] * 2, here)[0].dtype == torch.float64


def test_integers_and_booleans_are_gathered_by_kind():
    sources = [torch.tensor(n) for n in (1, 2, True, False, 1.5)]
    targets = room(sources, [t.dtype for t in sources], [CPU] * 5)
    Pairs(targets, sources).copy()
    assert [t.item() for t in targets] == [1, 2, True, False, 1.5]
    assert [t.dtype for t in targets] == [t.dtype for t in sources]


def test_room_is_zeros_of_the_same_layout_and_pickles_as_single_tensors():
    like = mixed_tensors()
    found = room(like, [t.dtype for t in like], [CPU] * len(like))
    for tensor, other in zip(found, like, strict=True):
        assert tensor.shape == other.shape
        assert tensor.stride() == other.stride() or not is_dense(other)
        assert not tensor.any()
    for tensor, other in zip(found, like, strict=True):
        tensor.copy_(other)
    for twin in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert all(t.equal(s) for t, s in zip(twin, like, strict=True))
        assert not any(
            t.data_ptr() == s.data_ptr() for t, s in zip(twin, found, strict=True) if t.numel()
        )
    assert len(pickle.dumps(found)) < 1.2 * sum(4 * t.numel() + 500 for t in like)
