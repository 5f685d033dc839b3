"""Memory of batches is used again, but never while anybody can see it."""

import gc

import pytest
import torch

from dgavg.data import memory
from dgavg.data.domains import as_floats
from dgavg.data.memory import floats

CPU = torch.device("cpu")
SHAPE = (4, 3, 256, 256)  # 3 MiB


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch):
    monkeypatch.setattr(memory, "_free", [])


def test_what_nobody_holds_is_used_again():
    first = floats(SHAPE, CPU)
    place = first.data_ptr()
    assert (first.shape, first.dtype) == (SHAPE, torch.float32)
    second = floats(SHAPE, CPU)
    assert second.data_ptr() != place
    del first
    third = floats((3, 3, 256, 256), CPU)
    assert third.data_ptr() == place
    assert third.is_contiguous()


@pytest.mark.parametrize(
    "hold",
    [
        lambda x: x[1:, 2],
        lambda x: x.flatten().detach(),
        lambda x: x.numpy(),
        lambda x: x.numpy()[0],
        lambda x: x.untyped_storage(),
        lambda x: torch.ones(SHAPE, requires_grad=True) * x,  # kept for the backward pass
        lambda x: memoryview(x.numpy()),
    ],
)
def test_what_anybody_holds_is_not(hold):
    x = floats(SHAPE, CPU)
    place = x.data_ptr()
    held = hold(x)
    del x
    assert floats(SHAPE, CPU).data_ptr() != place
    del held
    gc.collect()
    assert place in [part.data_ptr() for part in memory._free]


def test_another_size_gets_its_own():
    x = floats(SHAPE, CPU)
    place = x.data_ptr()
    del x
    assert floats((5, *SHAPE[1:]), CPU).data_ptr() != place  # too small for it
    assert floats((1, 3, 512, 342), CPU).data_ptr() != place  # would be wasted on it


def test_little_lies_unused(monkeypatch):
    monkeypatch.setattr(memory, "KEPT", 2 * 4 * 3 * 256 * 256 * 4)
    batches = [floats(SHAPE, CPU) for _ in range(5)]
    places = [x.data_ptr() for x in batches]
    while batches:
        del batches[0]
    assert [part.data_ptr() for part in memory._free] == places[3:]


def test_small_tensors_are_torchs():
    x = floats((4, 3, 8, 8), CPU)
    x.zero_()
    del x
    assert memory._free == []


def test_pixels_become_floats_in_it():
    pixels = torch.arange(4 * 3 * 256 * 256).view(SHAPE).to(torch.uint8)
    for _ in range(3):
        assert torch.equal(as_floats(pixels), pixels.to(torch.float32) / 255)
    assert len(memory._free) == 1
