"""Layout: the tensors of a model as one vector, and live ones read into it in chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dgavg.averaging.flat import is_dense

Strides = tuple[int, ...]


class Chunk(NamedTuple):
    """A stretch of the vector, and the parts of live tensors that stand there."""

    start: int
    stop: int
    parts: list[Tensor]
    strides: list[Strides]  # of each part in the vector

    def places(self, memory: Tensor) -> list[Tensor]:
        """Where in the vector `memory`, which holds this chunk alone, each part belongs."""
        found, at = [], 0
        for part, strides in zip(self.parts, self.strides, strict=True):
            found.append(memory.as_strided(part.shape, strides, memory.storage_offset() + at))
            at += part.numel()
        return found


class Layout:
    """The places of tensors in one vector without gaps, `size` numbers long.

    A tensor stands there with its own strides, or in the order of its axes if it has gaps.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.shapes = [t.shape for t in tensors]
        self.strides: list[Strides] = [
            t.stride() if is_dense(t) else torch.empty(t.shape, device="meta").stride()
            for t in tensors
        ]
        self.size = sum(t.numel() for t in tensors)

    def views(self, flat: Tensor) -> list[Tensor]:
        """The tensors that the vector `flat`, or each row of a matrix, consists of."""
        rows, jumps = tuple(flat.shape[:-1]), tuple(flat.stride()[:-1])
        found, offset = [], flat.storage_offset()
        for shape, strides in zip(self.shapes, self.strides, strict=True):
            found.append(flat.as_strided((*rows, *shape), (*jumps, *strides), offset))
            offset += shape.numel()
        return found

    def chunks(self, live: Sequence[Tensor], length: int) -> list[Chunk]:
        """The vector in chunks of at most `length` numbers, filled from tensors such as these.

        Longer only where a live tensor is not in memory as it is in the vector: it stays whole.
        """
        found: list[Chunk] = []
        start, stop = 0, 0
        parts: list[Tensor] = []
        strides: list[Strides] = []
        for part, stride in self._parts(live, length):
            if parts and stop - start + part.numel() > length:
                found.append(Chunk(start, stop, parts, strides))
                start, parts, strides = stop, [], []
            parts.append(part)
            strides.append(stride)
            stop += part.numel()
        return [*found, Chunk(start, stop, parts, strides)] if parts else found

    def _parts(self, live: Sequence[Tensor], length: int) -> Iterator[tuple[Tensor, Strides]]:
        for tensor, strides in zip(live, self.strides, strict=True):
            if tensor.stride() != strides:
                yield tensor, strides
            else:
                for part in torch.split(tensor.as_strided((tensor.numel(),), (1,)), length):
                    yield part, (1,)
