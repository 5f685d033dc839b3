"""Memory for batches, used again when nobody holds a batch any more.

A batch is tens of megabytes, which an allocator gives back to the system and asks for anew in each
step; and to hand out a page the system takes as long as the arithmetic on its pixels does.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from dgavg.averaging.flat import HUGE, zeros

KEPT = 256 << 20  # bytes that may lie unused

_free: list[Tensor] = []  # the oldest first
_lock = threading.RLock()  # a batch may end while another is made


def floats(shape: Sequence[int], device: torch.device) -> Tensor:
    """Float32 with anything in it. On a CPU, from 2 MiB on, memory of an earlier batch if possible.

    It is kept from use while any tensor or array shares it.
    """
    n = math.prod(shape)
    if device.type != "cpu" or n * 4 < HUGE:
        return torch.empty(tuple(shape), device=device)
    with _lock:
        fitting = [i for i, memory in enumerate(_free) if n <= len(memory) <= 2 * n]
        memory = _free.pop(fitting[-1]) if fitting else None
    if memory is None:
        (memory,) = zeros([n], torch.float32, device)
    array = memory[:n].numpy().view()  # what shares the tensor's memory keeps the array alive
    weakref.finalize(array, _give_back, memory).atexit = False
    return torch.from_numpy(array).view(tuple(shape))


def _give_back(memory: Tensor) -> None:
    with _lock:
        _free.append(memory)
        while sum(part.nbytes for part in _free) > KEPT:
            del _free[0]
