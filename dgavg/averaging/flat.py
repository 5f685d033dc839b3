"""Tensors side by side in one buffer, so that one call updates them all at memory speed."""

from __future__ import annotations

import mmap
from collections.abc import Hashable, Sequence
from contextlib import suppress
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dgavg.averaging.parameters import same_memory

ALIGN = 64  # elements: a tensor starts on a cache line whatever its dtype
HUGE = 1 << 21  # bytes of a huge page: what is smaller has none


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor fills its memory without gaps, in any order of its axes."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def padded(numel: int, align: int = ALIGN) -> int:
    """`numel` rounded up to where the next tensor may start."""
    return -(-numel // align) * align


def zeros(sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Vectors of zeros, each with a storage of its own.

    On a CPU under Linux, from 2 MiB in all, they stand in huge pages, which are faster to go
    through. This is memory as any other: a fork copies it on write, a pickle holds the numbers of
    one vector. But it can't grow in place, and goes back as a whole with the last vector.
    """
    starts = [0, *accumulate(map(padded, sizes))]
    memory = _huge(starts[-1] * dtype.itemsize) if device.type == "cpu" else None
    if memory is None:
        return [torch.zeros(n, dtype=dtype, device=device) for n in sizes]
    return [
        torch.frombuffer(memory, dtype=dtype, count=n, offset=start * dtype.itemsize)
        if n
        else torch.zeros(0, dtype=dtype)
        for n, start in zip(sizes, starts[:-1], strict=True)
    ]


def _huge(size: int) -> mmap.mmap | None:
    """Zeroed memory of the process's own; none where huge pages are unknown or would not help."""
    if size < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # out of memory: torch tells it as its users know it
        return None
    with suppress(OSError):  # a kernel built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def side_by_side(
    shapes: Sequence[Tensor], dtype: torch.dtype, device: torch.device, align: int = ALIGN
) -> list[Tensor]:
    """Zeros of the shapes and strides of the given tensors, next to each other in one buffer."""
    return laid_out(zeros([length(shapes, align)], dtype, device)[0], shapes, align)


def length(shapes: Sequence[Tensor], align: int = ALIGN) -> int:
    """How many elements tensors of these shapes take side by side."""
    return sum(padded(t.numel(), align) for t in shapes)


def laid_out(flat: Tensor, shapes: Sequence[Tensor], align: int = ALIGN) -> list[Tensor]:
    """Views of a buffer with the shapes and strides of the given tensors, one after the other."""
    found, offset = [], 0
    for t in shapes:
        strides = t.stride() if is_dense(t) else torch.empty(t.shape, device="meta").stride()
        found.append(flat.as_strided(t.shape, strides, offset))
        offset += padded(t.numel(), align)
    return found


def runs(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The indices of `tensors` that stand next to each other in memory, in the order they do."""
    order = sorted(range(len(tensors)), key=lambda i: _place(tensors[i]))
    found = groups([tensors[i] for i in order])
    return sorted([order[j] for j in group] for group in found)


def groups(tensors: Sequence[Tensor], align: int = ALIGN) -> list[list[int]]:
    """As `runs`, of tensors that follow one another in the sequence, too."""
    found: list[list[int]] = [[0]] if tensors else []
    for i, (left, right) in enumerate(pairwise(tensors)):
        if _adjacent(left, right, align):
            found[-1].append(i + 1)
        else:
            found.append([i + 1])
    return found


def _place(tensor: Tensor) -> tuple[int, int]:
    return tensor.untyped_storage().data_ptr(), int(tensor.storage_offset())


def _adjacent(left: Tensor, right: Tensor, align: int) -> bool:
    return bool(
        left.dtype == right.dtype
        and left.device == right.device
        and left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()
        and right.storage_offset() == left.storage_offset() + padded(left.numel(), align)
        and is_dense(left)
        and is_dense(right)
    )


def as_one(tensors: Sequence[Tensor]) -> Tensor:
    """A run of `groups` as one vector over the same memory, padding included."""
    first, last = tensors[0], tensors[-1]
    if len(tensors) == 1:
        return first
    length = last.storage_offset() + last.numel() - first.storage_offset()
    return first.as_strided((length,), (1,), first.storage_offset())


@torch.no_grad()
def flatten_parameters(model: nn.Module) -> None:
    """Move the parameters of `model` into one buffer for each dtype and device, values unchanged.

    The parameters stay the same objects, so optimizers, `load_state_dict` and training go on as
    before, and tied ones stay tied; averages of the model update all of them by one call. Averages
    check before each update that the parameters are still there: after `model.to(dtype)` or a
    `deepcopy`, which move them, they go back to one call on a list. Memory: once more the largest
    group of parameters while it moves. Saving a single parameter saves the whole buffer: save
    `model.state_dict()`, or a clone. cuDNN's recurrent layers have a buffer of their own
    (`nn.RNNBase.flatten_parameters`), which this takes them out of.

    Raises `ValueError` for parameters without a shape yet.
    """
    kinds: dict[tuple[torch.dtype, torch.device], dict[Hashable, list[nn.Parameter]]] = {}
    for name, p in model.named_parameters():
        if is_lazy(p):
            raise ValueError(f"{name} has no shape yet: run one batch before you flatten the model")
        kinds.setdefault((p.dtype, p.device), {}).setdefault(same_memory(p), []).append(p)
    for (dtype, device), tied in kinds.items():
        places = side_by_side([same[0] for same in tied.values()], dtype, device)
        for place, same in zip(places, tied.values(), strict=True):
            place.copy_(same[0])
            for p in same:
                p.data = place
