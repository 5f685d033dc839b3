"""Histories in states: only the rows that are filled, and of those the storage ends there."""

from __future__ import annotations

import copy
import io
import pickle
from itertools import pairwise

import pytest
import torch
from torch import nn

from dgavg.averaging import GaussianPosterior, LatestMean, RunningMean, WeightSubspace
from dgavg.averaging.rows import Place, Rows, first_rows

K = 4
KINDS = {
    "latest": lambda model, k=K: LatestMean(model, k=k, buffers="average"),
    "samples": lambda model, k=K: WeightSubspace(model, k=k, buffers="average"),
    "deviations": lambda model, k=K: GaussianPosterior(model, rank=k, buffers="average"),
}


class Net(nn.Module):
    """Sizes that are no multiple of a cache line, two dtypes, an order of axes, a scalar."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(5, 7))
        self.b = nn.Parameter(torch.zeros(30, dtype=torch.float64))
        self.c = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
        self.d = nn.Parameter(torch.tensor(0.0))
        self.norm = nn.BatchNorm1d(3)


def walked(model, steps, seed=0):
    """Sets the model's weights at random, `steps` times."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        with torch.no_grad():
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    tensor.copy_(torch.randn(tensor.shape, generator=draw, dtype=tensor.dtype))
        yield {k: v.clone() for k, v in model.state_dict().items()}


def saved(state):
    """What a file holds, and its size."""
    file = io.BytesIO()
    torch.save(state, file)
    size = file.tell()
    file.seek(0)
    return torch.load(file, weights_only=True), size


@pytest.mark.parametrize("updates", [0, 1, 3, 4, 6])
@pytest.mark.parametrize("part", KINDS)
def test_a_state_holds_the_rows_filled_and_no_more(part, updates):
    model = Net()
    average = KINDS[part](model)
    for _ in walked(model, updates):
        average.update(model)
    state, n = average.state_dict(), min(updates, K)
    found = {k: v for k, v in state["tensors"].items() if k.startswith(f"{part}/")}
    names = {k for k, v in model.state_dict().items() if v.is_floating_point()}
    assert found.keys() == {f"{part}/{k}" for k in names}
    for name in names:
        assert found[f"{part}/{name}"].shape == (n, *model.state_dict()[name].shape)
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in found.values()}
    assert len(storages) == {"latest": 2, "samples": 3, "deviations": 1}[part]
    exact = sum(t.numel() * t.itemsize for t in found.values())
    padding = 0 if part == "deviations" else n * len(names) * 63 * 8
    assert exact <= sum(storages.values()) <= exact + padding


@pytest.mark.parametrize("part", KINDS)
def test_a_file_grows_with_the_rows_until_all_are_filled(part):
    model = Net()
    with torch.no_grad():
        model.a = nn.Parameter(torch.zeros(50, 70))
    average, sizes = KINDS[part](model), []
    for _ in walked(model, K + 3):
        average.update(model)
        sizes.append(saved(average.state_dict())[1])
    row = model.a.nbytes
    steps = [b - a for a, b in pairwise(sizes)]
    assert all(row <= step < 2.5 * row for step in steps[: K - 1])
    assert all(abs(step) < row / 10 for step in steps[K - 1 :])


@pytest.mark.parametrize("updates", [1, 2, K, K + 1, 2 * K + 1])
@pytest.mark.parametrize("before", [0, 2, K + 1])
@pytest.mark.parametrize("part", KINDS)
def test_a_state_is_taken_up_to_the_bit_from_any_number_of_rows(part, before, updates):
    """Whatever the average had taken in before it loads, and through a file."""
    model, other = Net(), Net()
    straight, resumed = KINDS[part](model), KINDS[part](other)
    for _ in walked(other, before, seed=1):
        resumed.update(other)
    for _ in walked(model, updates, seed=2):
        straight.update(model)
    resumed.load_state_dict(saved(straight.state_dict())[0])
    assert resumed.count == updates
    for _ in walked(model, K + 1, seed=3):
        _equal(straight, resumed)
        straight.update(model)
        resumed.update(model)
    _equal(straight, resumed)


def _equal(one, other):
    mine, theirs = one.state_dict()["tensors"], other.state_dict()["tensors"]
    assert mine.keys() == theirs.keys()
    assert all(tensor.equal(theirs[name]) for name, tensor in mine.items())
    weights = other.weights()
    assert all(tensor.equal(weights[name]) for name, tensor in one.weights().items())


@pytest.mark.parametrize("part", KINDS)
def test_a_state_is_an_alias_and_loading_leaves_the_state_alone(part):
    model = Net()
    average = KINDS[part](model)
    for _ in walked(model, 2):
        average.update(model)
    state = average.state_dict()
    kept = copy.deepcopy(state)
    other = KINDS[part](Net())
    other.load_state_dict(state)
    for _ in walked(model, 3, seed=4):
        other.update(model)
    assert all(t.equal(kept["tensors"][k]) for k, t in state["tensors"].items())
    for tensor in state["tensors"].values():
        tensor.zero_()
    tensors = average.state_dict()["tensors"].values()
    assert not any(t.any() for t in tensors)


@pytest.mark.parametrize("part", KINDS)
def test_a_state_with_fewer_rows_than_it_says_or_other_names_is_refused(part):
    model = Net()
    average, other = KINDS[part](model), KINDS[part](model)
    for _ in walked(model, 3):
        average.update(model)
    state = average.state_dict()
    tensors = dict(state["tensors"])
    tensors[f"{part}/a"] = tensors[f"{part}/a"][:2]
    with pytest.raises(ValueError, match=rf"{part}/a is \(2, 5, 7\), the average \(3, 5, 7\)"):
        other.load_state_dict(state | {"tensors": tensors})
    del tensors[f"{part}/a"]
    with pytest.raises(ValueError, match=rf"1 names missing \({part}/a\), 0 unknown"):
        other.load_state_dict(state | {"tensors": tensors})
    assert other.count == 0


@pytest.mark.parametrize("part", KINDS)
def test_what_a_restart_forgot_is_not_stored(part):
    model = Net()
    average = KINDS[part](model)
    for _ in walked(model, K + 2):
        average.update(model)
    average.restart()
    fresh = KINDS[part](model)
    for _ in walked(model, 2, seed=5):
        average.update(model)
        fresh.update(model)
    assert average.state_dict()["tensors"][f"{part}/a"].shape == (2, 5, 7)
    resumed = KINDS[part](Net())
    resumed.load_state_dict(saved(average.state_dict())[0])
    for one in (average, resumed):
        weights = fresh.weights()
        assert all(t.equal(weights[k]) for k, t in one.weights().items())


@pytest.mark.parametrize("make", [copy.deepcopy, lambda rows: pickle.loads(pickle.dumps(rows))])
def test_a_copy_of_rows_is_one_of_its_own_whose_parts_are_one(make):
    live = [torch.zeros(3), torch.zeros(2, 2, dtype=torch.float64), torch.zeros(())]
    cpu = torch.device("cpu")
    rows = Rows(2, live, [(t.dtype, cpu) for t in live], [True, True, False])
    for i in range(2):
        for tensor in rows.row(i):
            tensor.fill_(i + 1)
    found = make(rows)
    assert [r.data_ptr() for r in found.counted] == [r.data_ptr() for r in found.rings[:2]]
    assert [t.tolist() for t in found.row(1)] == [t.tolist() for t in rows.row(1)]
    for ring in found.rings:
        ring.zero_()
    assert not any(t.any() for t in found.row(1))
    assert all(t.all() for t in rows.row(1))


@pytest.mark.parametrize("offset", [0, 6])
def test_first_rows_end_their_storage(offset):
    ring = torch.arange(30.0)[offset : offset + 24].view(4, 6)
    for n in range(5):
        head = first_rows(ring, n)
        assert head.equal(ring[:n])
        assert head.untyped_storage().nbytes() == 4 * (offset + 6 * n)
        assert n == 0 or head.data_ptr() == ring.data_ptr()
    assert saved({"x": first_rows(ring, 2)})[0]["x"].equal(ring[:2])


def test_the_mean_of_a_gaussian_is_that_of_a_running_mean_to_the_bit():
    """So that swa and swag of one chain are scored once."""
    model = nn.Sequential(nn.Linear(700, 501), nn.BatchNorm1d(501), nn.Linear(501, 3))
    mean, posterior = RunningMean(model), GaussianPosterior(model, rank=2)
    for _ in walked(model, 9):
        mean.update(model)
        posterior.update(model)
        expected = mean.weights()
        assert all(t.equal(expected[k]) for k, t in posterior.weights().items())


def test_an_infinite_first_weight_is_its_own_mean():
    live = {"w": torch.tensor([float("-inf"), 1.0], requires_grad=True)}
    posterior = GaussianPosterior(live, rank=1)
    posterior.update(live)
    assert posterior.weights()["w"].tolist() == [float("-inf"), 1.0]


def test_a_place_is_found_in_a_ring_that_starts_within_its_storage():
    ring = torch.arange(30.0)[5:29].view(4, 6)
    place = Place(ring, 2, torch.Size([2, 2]), (1, 2), True)
    exact = ring[:, 2:6].reshape(4, 2, 2).transpose(1, 2)
    assert place.row(3).equal(exact[3])
    assert place.rows_of(first_rows(ring, 3)).equal(exact[:3])
