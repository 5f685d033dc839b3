"""Samples: the last k weights of a model, and the sums over all of them that a subspace needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dgavg.averaging.flat import is_dense, padded, zeros
from dgavg.averaging.parameters import common, wide

CHUNK = 1 << 17  # numbers of one sample at once, so that sums in float32 stay exact
BUFFER = 1 << 19  # numbers that are float64 at once


class _Place(NamedTuple):
    """Where one tensor stands in every sample."""

    ring: Tensor  # (k, D)
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    counted: bool

    def row(self, i: int) -> Tensor:
        """The tensor in row `i`."""
        start = i * self.ring.stride(0) + self.offset
        return self.ring.as_strided(self.shape, self.stride, start)

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


class Samples:
    """The `k` latest lists of tensors put in, each in one row of a buffer (k, D).

    Row 0 holds a sample, the others their differences from it: samples that hardly differ would
    cancel in float32 otherwise. Each is true to one unit in the last place. Where a tensor is not
    `counted`, it is kept and mixed as the others are, but no product counts it.
    Results stand in the order of the samples, oldest first, K = min(n, k) of them.

    Memory: k times the tensors, in at least float32; a buffer for each dtype and device.
    """

    def __init__(
        self,
        k: int,
        live: Sequence[Tensor],
        kinds: Sequence[tuple[torch.dtype, torch.device]],
        counted: Sequence[bool],
    ) -> None:
        self.k = k
        self.order = torch.arange(k)  # the row of each sample, oldest first
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
            _Place(rings[key], offset, t.shape, _strides(t), key[1])
            for key, offset, t in zip(keys, offsets, live, strict=True)
        ]

    @classmethod
    def room_for(
        cls, k: int, live: Sequence[Tensor], device: torch.device | None, counted: Sequence[bool]
    ) -> Samples:
        """Room for tensors such as `live`, on `device` or where they are."""
        return cls(k, live, [(wide(t.dtype), device or t.device) for t in live], counted)

    def moved(self, live: Sequence[Tensor], device: torch.device | None) -> Samples:
        """The same samples on `device` or where `live` is, in its precision if that is higher."""
        now = [(p.ring.dtype, p.ring.device) for p in self.places]
        kinds = [
            (common(dtype, t.dtype), device or t.device)
            for (dtype, _), t in zip(now, live, strict=True)
        ]
        if kinds == now:
            return self
        found = Samples(self.k, live, kinds, [p.counted for p in self.places])
        found.order.copy_(self.order)
        for old, new in zip(self.places, found.places, strict=True):
            for i in range(self.k):
                new.row(i).copy_(old.row(i))
        return found

    def put(self, live: Sequence[Tensor], n: int) -> None:
        """Take in one more sample, after `n` before it."""
        row = self._free_row(n)
        if live:
            torch._foreach_copy_([place.row(row) for place in self.places], list(live))
        if row > 0:
            for ring in self.rings:
                ring[row] -= ring[0]

    def _free_row(self, n: int) -> int:
        """The row for the next sample: that of the oldest, once all are taken."""
        if n < self.k:
            self.order[n] = n
            return n
        row, newest = int(self.order[0]), int(self.order[-1])
        self.order[:-1] = self.order[1:].clone()
        if row == 0 and newest != 0:  # the newest goes to row 0, since it will stay the longest
            for ring in self.rings:
                for i in range(1, self.k):
                    if i != newest:
                        ring[i] -= ring[newest]
                ring[0] += ring[newest]
            self.order[-2], row = 0, newest
        self.order[-1] = row
        return row

    def products(self, n: int, *, relative: bool) -> Tensor:
        """The products of `n` samples, or of their differences from one, (n, n) in float64."""
        first = int(relative)
        found = torch.zeros(n, n, dtype=torch.float64)
        for ring in self.counted:
            exact = torch.float32 if ring.device.type == "mps" else torch.float64
            step = BUFFER // n
            buffer = ring.new_empty(n - first, step, dtype=exact)
            sums = ring.new_zeros(n - first, n - first, dtype=exact)
            for a in range(0, ring.shape[1], step):
                part = ring[first:n, a : a + step]
                x = buffer[:, : part.shape[1]].copy_(part)
                sums.addmm_(x, x.T)
            found[first:, first:] += sums.cpu().double()
        if not relative:
            found[1:] += found[0].clone()
            found[:, 1:] += found[:, :1].clone()
        order = self.order[:n]
        return found[order][:, order]

    def dot(self, tensors: Mapping[int, Tensor], n: int, *, relative: bool) -> Tensor:
        """The product of each of `n` samples with a vector, (n,) in float64.

        `tensors` are the parts of the vector by their index. With `relative` they lack a number
        that is the same for all.
        """
        first = int(relative)
        sums: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for i, tensor in tensors.items():
            place = self.places[i]
            flat = _flat(tensor, place)
            for part, rows in place.chunks(slice(first, n)):
                kind = rows.device, rows.dtype
                sums.setdefault(kind, []).append(torch.mv(rows, flat[part].to(*kind)))
        found = torch.zeros(n, dtype=torch.float64)
        for parts in sums.values():
            found[first:] += torch.stack(parts).cpu().double().sum(dim=0)
        if not relative:
            found[1:] += found[0].clone()
        return found[self.order[:n]]

    def mix(self, coefficients: Tensor, others: Tensor, targets: Sequence[Tensor]) -> None:
        """Write Σ c_i w_i into `targets`, with `others` for tensors that are not counted."""
        n = len(coefficients)
        rows = torch.empty(2, n, dtype=torch.float64)
        rows[:, self.order[:n]] = torch.stack([others, coefficients])
        rows[:, 0] = rows.sum(dim=1)  # row 0 is a part of every sample
        shares = {(r.dtype, r.device): rows.to(r.device, r.dtype) for r in self.rings}
        for place, target in zip(self.places, targets, strict=True):
            share = shares[place.ring.dtype, place.ring.device][int(place.counted)]
            if target.stride() == place.stride:
                _mix(place, share, target)
            else:
                target.copy_(_mix(place, share, place.like(target)))


def _mix(place: _Place, share: Tensor, target: Tensor) -> Tensor:
    """Σ share_i row_i into a tensor that has the strides of its place."""
    flat = _flat(target, place)
    direct = (flat.dtype, flat.device) == (share.dtype, share.device)
    for part, rows in place.chunks(slice(0, len(share))):
        if direct:
            torch.mv(rows.T, share, out=flat[part])
        else:
            flat[part].copy_(torch.mv(rows.T, share))
    return target


def _flat(tensor: Tensor, place: _Place) -> Tensor:
    """A tensor as a vector in the order of its place; a copy only where its strides differ."""
    if tensor.stride() != place.stride:
        tensor = place.like(tensor).copy_(tensor)
    return tensor.as_strided((place.shape.numel(),), (1,))


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Its own, where it fills its memory; those of a contiguous tensor otherwise."""
    if is_dense(tensor):
        return tensor.stride()
    return torch.empty(tensor.shape, device="meta").stride()
