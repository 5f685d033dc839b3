"""Images on their way to the device: held there where they fit, or else brought batch by batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")

SMALL = 64 << 20  # bytes that are copied on a CPU, since one gather is faster than one a domain
DEPTH = 2  # batches that are made ready while one is used

Part = tuple[Tensor, Tensor]  # images (N, C, H, W) and the rows (n,) of them that are meant


class Images:
    """Rows of some tensors of images, as if they stood one after the other on a device.

    Where they are `resident` they do: in one copy. Otherwise each batch is gathered from the
    tensors, which lie in memory or are mapped from a file, and sent to the device. What comes out
    is the same to the bit. None measures: a copy is made if it fills at most half of the device's
    free memory, and on a CPU only of what is small, for there it saves next to nothing.
    """

    def __init__(
        self, parts: Sequence[Part], device: torch.device, resident: bool | None = None
    ) -> None:
        self.device = device
        self._sources = [images for images, _ in parts]
        self._keys = [keys for _, keys in parts]
        self._starts = np.cumsum([0, *(len(keys) for keys in self._keys)])
        first = self._sources[0]
        self._shape, self._dtype = tuple(first.shape[1:]), first.dtype
        size = int(self._starts[-1]) * first[0].numel() * first.element_size()
        on_cpu = all(source.device.type == "cpu" for source in self._sources)
        self.resident = not on_cpu or (size <= room(device) if resident is None else resident)
        if self.resident:
            self._all = torch.empty(len(self), *self._shape, dtype=self._dtype, device=device)
            for (source, keys), start in zip(parts, self._starts, strict=False):
                step = max(1, SMALL // max(1, first[0].numel()))  # no second copy of it all
                for i in range(0, len(keys), step):
                    rows = keys[i : i + step]
                    self._all[start + i : start + i + len(rows)].copy_(source[rows])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def take(self, rows: Tensor) -> Tensor:
        """The images at rows (n,), which lie on a CPU or on the device: (n, C, H, W) there."""
        if self.resident:
            return self._all.index_select(0, rows.to(self.device))
        return self.send(self.gather(rows))

    def rows(self, rows: slice | Tensor) -> Tensor:
        """Some images: on the device if resident, else on the CPU, ready for `send`."""
        if self.resident:
            return self._all[rows]
        return self.gather(torch.arange(len(self))[rows])

    def gather(self, rows: Tensor) -> Tensor:
        """The images at rows (n,) on the CPU, ready for `send`; any thread may call it.

        NumPy copies them, for torch would spread a copy over the threads that compute.
        """
        pin = self.device.type == "cuda"
        out = torch.empty(len(rows), *self._shape, dtype=self._dtype, pin_memory=pin)
        wanted = rows.cpu().numpy()
        owner = np.searchsorted(self._starts, wanted, side="right") - 1
        for i in np.unique(owner):
            (places,) = np.nonzero(owner == i)
            keys = self._keys[i].numpy()[wanted[places] - self._starts[i]]
            source = self._sources[i].numpy()
            first, last = places[0], places[-1] + 1
            if source.flags.c_contiguous and last - first == len(places):
                np.take(source, keys, axis=0, out=out.numpy()[first:last], mode="clip")
            else:
                out.numpy()[places] = source[keys]
        return out

    def send(self, gathered: Tensor) -> Tensor:
        """What `gather` gave, on the device; a GPU is not waited for."""
        return gathered.to(self.device, non_blocking=True)


def room(device: torch.device) -> int:
    """How many bytes of images may be copied to a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (free + unused) // 2
    if device.type == "mps":
        total = torch.mps.recommended_max_memory()
        return max(0, total - torch.mps.driver_allocated_memory()) // 2
    return SMALL


class Ahead(Generic[R]):
    """Results of `work(0)`, `work(1)`, …, the next ones made by a thread while one is used.

    They may be asked for in any order; in order they are ready.
    """

    def __init__(self, work: Callable[[int], R]) -> None:
        self._work = work
        self._pool: ThreadPoolExecutor | None = None
        self._pid = 0
        self._ready: dict[int, Future[R]] = {}

    def __call__(self, t: int) -> R:
        if self._pool is None or self._pid != os.getpid():  # threads don't outlive a fork
            self._pool, self._pid, self._ready = ThreadPoolExecutor(1), os.getpid(), {}
        future = self._ready.pop(t, None)
        for other in self._ready.keys() - set(range(t + 1, t + 1 + DEPTH)):
            self._ready.pop(other).cancel()
        found = self._work(t) if future is None or future.cancel() else future.result()
        for i in range(t + 1, t + 1 + DEPTH):
            if i not in self._ready:
                self._ready[i] = self._pool.submit(self._work, i)
        return found


def ahead(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`map(work, items)`, the next results made by a thread while one is used."""
    with ThreadPoolExecutor(1) as pool:
        left = iter(items)
        waiting = [pool.submit(work, item) for item in islice(left, DEPTH)]
        try:
            while waiting:
                found = waiting.pop(0).result()
                waiting += [pool.submit(work, item) for item in islice(left, 1)]
                yield found
        finally:
            pool.shutdown(cancel_futures=True)
