"""Tensors side by side in one buffer, so that one call updates them all at memory speed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

ALIGN = 64  # elements: a tensor starts on a cache line whatever its dtype


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor fills its memory without gaps, in any order of its axes."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def padded(numel: int) -> int:
    """`numel` rounded up to where the next tensor may start."""
    return -(-numel // ALIGN) * ALIGN


def side_by_side(
    shapes: Sequence[Tensor], dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Zeros of the shapes and strides of the given tensors, next to each other in one buffer."""
    flat = torch.zeros(sum(padded(t.numel()) for t in shapes), dtype=dtype, device=device)
    found, offset = [], 0
    for t in shapes:
        strides = t.stride() if is_dense(t) else torch.empty(t.shape, device="meta").stride()
        found.append(flat.as_strided(t.shape, strides, offset))
        offset += padded(t.numel())
    return found


def groups(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The indices of `tensors` in runs that stand next to each other in memory."""
    found: list[list[int]] = [[0]] if tensors else []
    for i, (left, right) in enumerate(pairwise(tensors)):
        if _adjacent(left, right):
            found[-1].append(i + 1)
        else:
            found.append([i + 1])
    return found


def _adjacent(left: Tensor, right: Tensor) -> bool:
    return bool(
        left.dtype == right.dtype
        and left.device == right.device
        and left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()
        and right.storage_offset() == left.storage_offset() + padded(left.numel())
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
    before; averages made of the model afterwards update all of them by one call. Averages check
    before each update that the parameters are still there: after `model.to(dtype)` or a
    `deepcopy`, which move them, they go back to one call on a list. Memory: once more the largest
    group of parameters while it moves. Saving a single parameter saves the whole buffer: save
    `model.state_dict()`, or a clone. cuDNN's recurrent layers have a buffer of their own
    (`nn.RNNBase.flatten_parameters`), which this takes them out of.
    """
    kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for p in model.parameters():
        kinds.setdefault((p.dtype, p.device), []).append(p)
    for (dtype, device), parameters in kinds.items():
        _rebind(parameters, side_by_side(parameters, dtype, device))


def _rebind(parameters: Iterable[nn.Parameter], places: Iterable[Tensor]) -> None:
    for p, place in zip(parameters, places, strict=True):
        place.copy_(p)
        p.data = place
