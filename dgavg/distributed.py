"""One run on several processes: how they meet and part, and what the first does for all.

`torchrun` starts the processes and says in the environment who each of them is. The model is in no
wrapper: torch's `DistributedDataParallel` averages gradients in hooks of `.backward()`, so those
that a link takes by `torch.autograd.grad` (MLDG, Fish, AND-mask) would silently stay one process's.
`dgavg.buckets` averages them, whichever call takes them, and `dgavg.gather` makes losses those of
the whole batch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from functools import cache
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from dgavg.averaging.moments import ranks
from dgavg.errors import UserError, require

__all__ = ["is_first", "on_first", "rank", "ranks", "tell", "together"]

T = TypeVar("T")

NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun always sets
PATIENCE = timedelta(days=1)  # one process may read data for hours; dead ones torchrun finds
MANNERS = timedelta(seconds=5)  # that a process waits for the first to say what went wrong
SAID = "dgavg/said"

_meetings = count()  # a number for each time that they meet


@cache
def _store() -> Any:
    """Where processes leave word for each other."""
    return next(rendezvous("env://", timeout=PATIENCE))[0]


def launched() -> tuple[int, int]:
    """Which process this is, and of how many, by the environment."""
    if not all(os.environ.get(name) for name in NAMES):
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def rank() -> int:
    """Which of the processes that train together this is."""
    return dist.get_rank() if ranks() > 1 else 0


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return rank() == 0


def local_rank() -> int:
    """Which process of this machine this is: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def check_devices() -> None:
    """Raise `UserError` where several processes of this machine would share a GPU."""
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    require(
        here <= gpus,
        f"{here} processes on a machine with {gpus} GPU{'s' * (gpus != 1)}: start torchrun with "
        f"--nproc-per-node {max(gpus, 1)}, or write device=cpu",
    )


@contextmanager
def together() -> Iterator[None]:
    """In this block the processes that torchrun started are one group; a lone process is none.

    A group that is there already is left alone. NCCL carries what is on a GPU, gloo the rest.
    """
    who, size = launched()
    if size == 1 or dist.is_initialized():
        yield
        return
    gpus = torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(local_rank() % gpus)
    place = dist.PrefixStore(f"dgavg/{next(_meetings)}", _store())  # type: ignore[attr-defined]
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    dist.init_process_group(backend, store=place, rank=who, world_size=size, timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def only_first_speaks() -> Iterator[None]:
    """In this block the other processes print nothing."""
    with ExitStack() as stack:
        if launched()[0] > 0:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        yield


def on_first(work: Callable[[], T]) -> T:
    """What `work` gives in the first process; the others don't call it, and get a copy.

    Its `UserError` is raised in all of them, so none waits for one that has given up.
    """
    if ranks() == 1:
        return work()
    found: list[Any] = [None, None]
    failed: UserError | None = None
    if is_first():
        try:
            found[0] = work()
        except UserError as error:
            failed = found[1] = error
    dist.broadcast_object_list(found, src=0)
    if failed is not None or found[1] is not None:
        raise failed or found[1]
    result: T = found[0]
    return result


def first_alone(work: Callable[[], T]) -> T:
    """What `work` gives, in every process, but in the first before all others.

    So that it alone downloads a file or fills a cache. Raises what `on_first` raises.
    """
    if ranks() == 1:
        return work()
    kept: list[T] = []
    on_first(lambda: kept.append(work()))
    return kept[0] if kept else work()


def tell(line: str) -> None:
    """Print a mistake to standard error, once.

    Most mistakes all processes make: the first says so. One that it does not hear of in time is
    another one's own, who then says it itself.
    """
    who, _ = launched()
    if who == 0 or not _said():
        print(line, file=sys.stderr, flush=True)
    if who == 0 and _met():
        _store().set(SAID, "yes")


def _met() -> bool:
    return _store.cache_info().currsize > 0


def _said() -> bool:
    """Whether the first process has spoken, or is gone."""
    if not _met():  # each made the mistake by itself, before
        return True
    try:
        _store().wait([SAID], MANNERS)
    except dist.DistNetworkError:  # the store went with the first process
        return True
    except dist.DistStoreError:
        return False
    return True
