"""Averages in huge pages: the same numbers, in memory that is as any other."""

from __future__ import annotations

import copy
import gc
import io
import mmap
import os
import pickle
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from trajectories import assert_same, snapshot, walk

from dgavg.averaging import ExponentialMean, LatestMean, RunningMean, flatten_parameters
from dgavg.averaging.flat import HUGE, side_by_side, zeros
from dgavg.averaging.pairs import room

CPU = torch.device("cpu")
BIG = HUGE // 4 + 5  # numbers in float32
linux = pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for under Linux")


def flags_at(address):
    """What the kernel says of the memory at `address`; none where there is none."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return None


def asked_for(tensor):
    return "hg" in flags_at(tensor.data_ptr())


def big_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(700, 900), nn.BatchNorm1d(900), nn.Linear(900, 5))


@pytest.fixture(params=["huge", "plain"])
def _memory(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)


KINDS = [
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e5m2),
    *(torch.complex64, torch.complex128, torch.int64, torch.bool),
]


@pytest.mark.usefixtures("_memory")
@pytest.mark.parametrize("dtype", KINDS)
def test_vectors_of_zeros_of_every_kind(dtype):
    sizes = [3, 0, HUGE // dtype.itemsize + 1, 64, 1]
    found = zeros(sizes, dtype, CPU)
    assert [t.shape for t in found] == [(n,) for n in sizes]
    assert {t.dtype for t in found} == {dtype}
    assert [t.untyped_storage().nbytes() for t in found] == [n * dtype.itemsize for n in sizes]
    assert all(t.data_ptr() % 64 == 0 for t in found)
    assert not any(t.to(torch.complex128).any() for t in found)
    for i, t in enumerate(found):
        t.fill_(i % 2)
    for i, t in enumerate(found):
        assert t.to(torch.complex128).eq(i % 2).all()


@linux
def test_huge_pages_are_asked_for_from_two_mebibytes_on_in_all():
    assert all(map(asked_for, zeros([BIG], torch.float32, CPU)))
    assert all(map(asked_for, zeros([HUGE // 8] * 2, torch.float32, CPU)))
    assert not asked_for(zeros([HUGE // 4 - 64], torch.float32, CPU)[0])
    assert asked_for(side_by_side([torch.zeros(BIG)], torch.float32, CPU)[0])
    like = [torch.zeros(200, 300) for _ in range(20)]  # each of them small, and no neighbours
    assert all(map(asked_for, room(like, [torch.float32] * 20, [CPU] * 20)))


def test_other_devices_have_memory_of_their_own():
    assert zeros([BIG], torch.float32, torch.device("meta"))[0].is_meta


@linux
def test_a_kernel_without_huge_pages_will_do(monkeypatch):
    class Refusing(mmap.mmap):
        def madvise(self, *_):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refusing)
    found = zeros([BIG], torch.float32, CPU)[0]
    assert not asked_for(found)
    assert found.eq(0).all()


@pytest.mark.usefixtures("_memory")
def test_out_of_memory_is_the_error_that_torch_has():
    with pytest.raises(RuntimeError, match="allocate"):
        zeros([1 << 50], torch.float32, CPU)


@linux
def test_a_fork_copies_on_write():
    vector = zeros([BIG], torch.float32, CPU)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks with threads
        child = os.fork()
    if child == 0:
        vector.numpy()[:] = 1.0
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert not vector.any()


@linux
def test_the_memory_goes_back_with_the_last_vector():
    first, last = zeros([BIG, BIG], torch.float32, CPU)
    address = first.data_ptr()
    view = last.fill_(2.0)[5:7]
    del first, last
    gc.collect()
    assert view.tolist() == [2.0, 2.0]
    assert flags_at(address) is not None
    del view
    gc.collect()
    assert flags_at(address) is None


def through_file(tensor):
    file = io.BytesIO()
    torch.save(tensor, file)
    assert file.tell() < tensor.nbytes + 5000
    file.seek(0)
    return torch.load(file)


def through_pickle(tensor):
    assert len(pickle.dumps(tensor)) < tensor.nbytes + 5000
    return pickle.loads(pickle.dumps(tensor))


@pytest.mark.usefixtures("_memory")
@pytest.mark.parametrize("way", [through_file, through_pickle, copy.deepcopy, torch.clone])
def test_a_copy_of_one_vector_is_of_it_alone(way):
    one, other = zeros([BIG, BIG], torch.bfloat16, CPU)
    one.fill_(3.0)
    found = way(one)
    found.sub_(1.0)
    assert found.eq(2.0).all()
    assert one.eq(3.0).all()
    assert not other.any()


@pytest.mark.usefixtures("_memory")
def test_a_flat_model_can_be_shared_with_other_processes():
    model = big_net()
    before = snapshot(model)
    flatten_parameters(model)
    model.share_memory()
    assert all(p.is_shared() for p in model.parameters())
    assert_same(snapshot(model), before, rtol=0)
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == 1


@pytest.mark.usefixtures("_memory")
def test_a_vector_can_be_shared_with_other_processes():
    vector, other = zeros([BIG, BIG], torch.float32, CPU)
    vector.fill_(1.0)
    vector.share_memory_()
    vector[0] = 5.0
    assert (vector[0].item(), vector[-1].item(), vector.is_shared()) == (5.0, 1.0, True)
    assert not other.any()


@linux
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("kind", [RunningMean, ExponentialMean, LatestMean])
def test_averages_are_the_same_to_the_bit_in_any_memory(kind, flat, monkeypatch):
    states = []
    for plain in (False, True):
        if plain:
            monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
        model = big_net()
        if flat:
            flatten_parameters(model)
        average = kind(model, buffers="average")
        for step in walk(model, 4):
            if step == 3:
                state = copy.deepcopy(average.state_dict())
                average = pickle.loads(pickle.dumps(average))
                average.restart()
                average.load_state_dict(state)
            average.update(model)
        tensors = average.state_dict()["tensors"]
        assert asked_for(next(t for k, t in tensors.items() if "0.weight" in k)) is not plain
        states.append({k: t.clone() for k, t in tensors.items()})
    assert_same(*states, rtol=0)
