"""Many tensors moved by few calls: neighbours in memory as one, small ones gathered first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from dgavg.averaging.flat import (
    ALIGN,
    as_one,
    groups,
    is_dense,
    laid_out,
    length,
    runs,
    zeros,
)

SMALL = 1 << 11  # numbers: up to here a call of its own costs more than gathering a tensor
PACK = 1 << 16  # numbers gathered at once: they stay in the cache
CHUNK = 1 << 22  # numbers converted at once where two sides differ in dtype or device

Kind = tuple[str, ...]
Pair = tuple[Tensor, Tensor]


class Room(list[Tensor]):
    """Tensors of one's own, in memory that `Pairs` moves by few calls; see `room`."""

    def __reduce__(self) -> tuple[Any, ...]:
        """As single tensors: pickle writes the whole buffer for every view of it."""
        return _furnished, ([t.clone() for t in self],)

    def __deepcopy__(self, memo: dict[int, Any]) -> Room:
        return _furnished(self)


def _furnished(tensors: list[Tensor]) -> Room:
    found = room(tensors, [t.dtype for t in tensors], [t.device for t in tensors])
    if found:
        torch._foreach_copy_(found, tensors)
    return found


@torch.no_grad()
def room(
    like: Sequence[Tensor], dtypes: Sequence[torch.dtype], devices: Sequence[torch.device]
) -> Room:
    """Zeros of the shapes and strides of `like`: its runs as runs, small tensors side by side."""

    def kind(i: int) -> Kind:
        return _kind(dtypes[i], devices[i], like[i])

    parts: list[tuple[list[int], int]] = []  # what shares a buffer, and how it is aligned
    single: list[int] = []
    for run in runs(like):
        if len(run) > 1 and len({kind(i) for i in run}) == 1:
            parts.append((run, ALIGN))
        else:
            single += run
    small = sorted((i for i in sorted(single) if _is_small(like[i])), key=kind)
    parts += [([i], ALIGN) for i in sorted(set(single).difference(small))]
    parts += [(list(part), 1) for _, part in groupby(small, key=kind)]
    found: dict[int, Tensor] = {}
    for where in dict.fromkeys(zip(dtypes, devices, strict=True)):
        here = [p for p in parts if (dtypes[p[0][0]], devices[p[0][0]]) == where]
        shapes = [([like[i] for i in part], align) for part, align in here]
        flats = zeros([length(*shape) for shape in shapes], *where)
        for (part, _), flat, shape in zip(here, flats, shapes, strict=True):
            found.update(zip(part, laid_out(flat, *shape), strict=True))
    return Room(found[i] for i in range(len(like)))


def moved(
    held: list[Tensor],
    like: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
    devices: Sequence[torch.device],
) -> list[Tensor]:
    """`held` where it fits tensors such as `like`, else its numbers in new room."""
    fit = all(
        m.dtype == dtype and m.device == device and (m.stride() == t.stride() or not is_dense(t))
        for m, t, dtype, device in zip(held, like, dtypes, devices, strict=True)
    )
    if fit and all(len(groups([held[i] for i in run])) == 1 for run in runs(like)):
        return held
    found = room(like, dtypes, devices)
    if found:
        torch._foreach_copy_(found, held)
    return found


class Pairs:
    """`targets`, each to be moved towards one of `sources` by `copy` or `lerp`.

    Memory: at most 65,536 numbers that it gathers, and where both sides differ in dtype or device
    4 million that it converts (or the largest tensor that has gaps in its memory).
    """

    def __init__(self, targets: list[Tensor], sources: list[Tensor]) -> None:
        self.targets, self.sources = targets, sources
        left, pairs = self._merged()
        packs = list(self._neighbours([i for i in left if self._may_gather(i)]))
        self._packs = self._gathering(packs)
        packed = {i for pack in packs for i in pack}
        pairs += [(targets[i], sources[i]) for i in left if i not in packed]
        other = [part for pair in pairs if not _alike(*pair) for part in _split(*pair)]
        alike = sorted((pair for pair in pairs if _alike(*pair)), key=_kind_of)
        self._alike = [_sides(list(part)) for _, part in groupby(alike, key=_kind_of)]
        self._converted = [_sides(b) for b in _filled([(p, p[0].numel()) for p in other], CHUNK)]

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of an average pairs its tensors anew."""
        return Pairs, ([], [])

    def copy(self) -> None:
        """Make the targets what the sources are."""
        for targets, sources in (*self._alike, *self._converted):
            torch._foreach_copy_(targets, sources)
        for pack in self._packs:
            pack.copy()

    def lerp(self, rate: float) -> None:
        """Move the targets by `rate` of the way to the sources."""
        for targets, sources in self._alike:
            torch._foreach_lerp_(targets, sources, rate)
        for targets, sources in self._converted:
            _lerp_converted(targets, sources, rate)
        for pack in self._packs:
            pack.lerp(rate)

    def _merged(self) -> tuple[list[int], list[Pair]]:
        """The indices of all that are no run on both sides; the runs as pairs of vectors."""
        left: list[int] = []
        pairs: list[Pair] = []
        for run in runs(self.sources):
            targets, sources = [self.targets[i] for i in run], [self.sources[i] for i in run]
            if (
                len(run) > 1
                and len(groups(targets)) == 1
                and all(map(_same_order, targets, sources))
            ):
                pairs.append((as_one(targets), as_one(sources)))
            else:
                left += run
        return sorted(left), pairs

    def _may_gather(self, i: int) -> bool:
        return _is_small(self.sources[i]) and _same_order(self.targets[i], self.sources[i])

    def _kind(self, i: int) -> Kind:
        return _kind_of((self.targets[i], self.sources[i]))

    def _neighbours(self, small: list[int]) -> Iterator[list[int]]:
        """Indices of one kind whose targets stand side by side."""
        for _, part in groupby(sorted(small, key=self._kind), key=self._kind):
            members = list(part)
            for group in groups([self.targets[i] for i in members], align=1):
                sized = [(members[j], self.sources[members[j]].numel()) for j in group]
                yield from (pack for pack in _filled(sized, PACK) if len(pack) > 1)

    def _gathering(self, packs: list[list[int]]) -> list[_Pack]:
        length = max((sum(self.sources[i].numel() for i in pack) for pack in packs), default=0)
        scratch: dict[Kind, Tensor] = {}
        for pack in packs:
            first = self.sources[pack[0]]
            with torch.inference_mode(False):  # it is written to later on, in any mode
                scratch.setdefault(self._kind(pack[0]), first.new_empty(length))
        return [
            _Pack(
                [self.targets[i] for i in pack],
                [self.sources[i] for i in pack],
                scratch[self._kind(pack[0])],
            )
            for pack in packs
        ]


class _Pack:
    """Small tensors side by side, and those that they follow, wherever they are."""

    def __init__(self, targets: list[Tensor], sources: list[Tensor], scratch: Tensor) -> None:
        self.target, self.sources = as_one(targets), [_as_vector(t) for t in sources]
        self.scratch = scratch[: len(self.target)]
        self.alike = _alike(self.target, scratch)

    def copy(self) -> None:
        if self.alike:
            torch.cat(self.sources, out=self.target)
        else:
            self.target.copy_(torch.cat(self.sources, out=self.scratch))

    def lerp(self, rate: float) -> None:
        source = torch.cat(self.sources, out=self.scratch)
        self.target.lerp_(source.to(self.target.device, self.target.dtype), rate)


def _kind(dtype: torch.dtype, device: torch.device, source: Tensor) -> Kind:
    return str(dtype), str(device), str(source.dtype), str(source.device)


def _kind_of(pair: Pair) -> Kind:
    return _kind(pair[0].dtype, pair[0].device, pair[1])


def _alike(target: Tensor, source: Tensor) -> bool:
    return target.dtype == source.dtype and target.device == source.device


def _is_small(tensor: Tensor) -> bool:
    return tensor.numel() <= SMALL and is_dense(tensor)


def _same_order(target: Tensor, source: Tensor) -> bool:
    """Whether both have their numbers in the same order in memory, without gaps."""
    return target.stride() == source.stride() and is_dense(source)


def _as_vector(tensor: Tensor) -> Tensor:
    """A dense tensor in the order of its memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _sides(pairs: Sequence[Pair]) -> tuple[list[Tensor], list[Tensor]]:
    return [target for target, _ in pairs], [source for _, source in pairs]


def _filled(sized: Sequence[tuple[Any, int]], limit: int) -> Iterator[list[Any]]:
    """Items in batches whose sizes add up to at most `limit`; a larger one is alone."""
    batch: list[Any] = []
    total = 0
    for item, size in sized:
        if batch and total + size > limit:
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += size
    if batch:
        yield batch


def _split(target: Tensor, source: Tensor) -> Iterator[Pair]:
    """In parts of at most `CHUNK` numbers, where neither has gaps."""
    if _same_order(target, source):
        parts = [torch.split(_as_vector(t), CHUNK) for t in (target, source)]
        yield from zip(*parts, strict=True)
    else:
        yield target, source


def _lerp_converted(targets: list[Tensor], sources: list[Tensor], rate: float) -> None:
    converted = [s.to(t.device, t.dtype) for t, s in zip(targets, sources, strict=True)]
    torch._foreach_lerp_(targets, converted, rate)
