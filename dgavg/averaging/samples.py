"""Samples: the last k weights of a model, and the sums over all of them that a subspace needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dgavg.averaging.parameters import common, wide
from dgavg.averaging.rows import Kind, Place, Rows

BUFFER = 1 << 19  # numbers that are float64 at once


class Samples(Rows):
    """The `k` latest lists of tensors put in, each in one row of a buffer (k, D).

    Row 0 holds a sample, the others their differences from it: samples that hardly differ would
    cancel in float32 otherwise. Each is true to one unit in the last place. Where a tensor is not
    `counted`, it is kept and mixed as the others are, but no product counts it.
    Results stand in the order of the samples, oldest first, K = min(n, k) of them.

    Memory: k times the tensors, in at least float32; a buffer for each dtype and device.
    """

    def __init__(
        self, k: int, live: Sequence[Tensor], kinds: Sequence[Kind], counted: Sequence[bool]
    ) -> None:
        super().__init__(k, live, kinds, counted)
        self.order = torch.arange(k)  # the row of each sample, oldest first

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
        found.take(self)
        return found

    def put(self, live: Sequence[Tensor], n: int) -> None:
        """Take in one more sample, after `n` before it."""
        row = self._free_row(n)
        if live:
            torch._foreach_copy_(self.row(row), list(live))
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


def _mix(place: Place, share: Tensor, target: Tensor) -> Tensor:
    """Σ share_i row_i into a tensor that has the strides of its place."""
    flat = _flat(target, place)
    direct = (flat.dtype, flat.device) == (share.dtype, share.device)
    for part, rows in place.chunks(slice(0, len(share))):
        if direct:
            torch.mv(rows.T, share, out=flat[part])
        else:
            flat[part].copy_(torch.mv(rows.T, share))
    return target


def _flat(tensor: Tensor, place: Place) -> Tensor:
    """A tensor as a vector in the order of its place; a copy only where its strides differ."""
    if tensor.stride() != place.stride:
        tensor = place.like(tensor).copy_(tensor)
    return tensor.as_strided((place.shape.numel(),), (1,))
