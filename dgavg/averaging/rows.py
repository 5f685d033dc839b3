"""Rows: the tensors of a model, k times, each time in one row of a buffer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgavg.averaging.flat import is_dense, padded, zeros

CHUNK = 1 << 17  # numbers of one row at once, so that sums in float32 stay exact

Kind = tuple[torch.dtype, torch.device]


class Place(NamedTuple):
    """Where one tensor stands in every row."""

    ring: Tensor  # (k, D)
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    counted: bool

    def row(self, i: int) -> Tensor:
        """The tensor in row `i`."""
        start = self.ring.storage_offset() + i * self.ring.stride(0) + self.offset
        return self.ring.as_strided(self.shape, self.stride, start)

    def rows_of(self, ring: Tensor) -> Tensor:
        """The tensor in each of the n rows of `ring`, (n, ...)."""
        start = ring.storage_offset() + self.offset
        strides = (ring.stride(0), *self.stride)
        return ring.as_strided((len(ring), *self.shape), strides, start)

    def chunks(self, rows: slice) -> Iterator[tuple[slice, Tensor]]:
        """Parts of the tensor: their flat indices, and what `rows` hold of them."""
        for a in range(0, self.shape.numel(), CHUNK):
            b = min(a + CHUNK, self.shape.numel())
            yield slice(a, b), self.ring[rows, self.offset + a : self.offset + b]

    def like(self, tensor: Tensor) -> Tensor:
        """Room for the same numbers as `tensor` in the order that they have in the ring."""
        return torch.empty_strided(
            self.shape, self.stride, dtype=tensor.dtype, device=tensor.device
        )


class Rows:
    """Room for `k` lists of tensors such as `live`, in a buffer (k, D) for each kind.

    `kinds` are their dtypes and devices here; those `counted` and the others stand apart.

    Memory: k times the tensors.
    """

    def __init__(
        self, k: int, live: Sequence[Tensor], kinds: Sequence[Kind], counted: Sequence[bool]
    ) -> None:
        self.k = k
        keys = list(zip(kinds, counted, strict=True))
        sizes = dict.fromkeys(keys, 0)
        offsets = []
        for key, t in zip(keys, live, strict=True):
            offsets.append(sizes[key])
            sizes[key] += padded(t.numel())
        rings = {
            (kind, counts): zeros([k * size], *kind)[0].view(k, size)
            for (kind, counts), size in sizes.items()
        }
        self.rings = list(rings.values())
        self.counted = [ring for (_, counts), ring in rings.items() if counts]
        self.places = [
            Place(rings[key], offset, t.shape, _strides(t), key[1])
            for key, offset, t in zip(keys, offsets, live, strict=True)
        ]

    def row(self, i: int) -> list[Tensor]:
        """The tensors in row `i`."""
        return [place.row(i) for place in self.places]

    def first(self, n: int) -> list[Tensor]:
        """Each tensor in the first `n` rows, (n, ...), for a checkpoint; see `first_rows`."""
        heads = {id(ring): first_rows(ring, n) for ring in self.rings}
        return [place.rows_of(heads[id(place.ring)]) for place in self.places]

    def take(self, other: Rows) -> None:
        """Copy the rows of another one."""
        for mine, theirs in zip(self.places, other.places, strict=True):
            for i in range(self.k):
                mine.row(i).copy_(theirs.row(i))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy stands in memory of the same kind."""
        self.__dict__.update(state)
        copies = {id(ring): _copy(ring) for ring in self.rings}
        self.rings = [copies[id(ring)] for ring in self.rings]
        self.counted = [copies[id(ring)] for ring in self.counted]
        self.places = [place._replace(ring=copies[id(place.ring)]) for place in self.places]


def _copy(ring: Tensor) -> Tensor:
    return zeros([ring.numel()], ring.dtype, ring.device)[0].view(ring.shape).copy_(ring)


def first_rows(ring: Tensor, n: int) -> Tensor:
    """The first `n` rows as an alias whose storage ends with them.

    `torch.save` writes storages as a whole: of `ring[:n]` it would write all rows. On devices whose
    storages are no plain memory it does.
    """
    if ring.device.type not in ("cpu", "cuda"):
        return ring[:n]
    end = (ring.storage_offset() + n * ring.stride(0)) * ring.itemsize
    head = torch.empty(0, dtype=ring.dtype, device=ring.device)
    head.set_(
        ring.untyped_storage()[:end],
        ring.storage_offset(),
        (n, *ring.shape[1:]),
        ring.stride(),
    )
    return head


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Its own, where it fills its memory; those of a contiguous tensor otherwise."""
    if is_dense(tensor):
        return tensor.stride()
    return torch.empty(tensor.shape, device="meta").stride()
