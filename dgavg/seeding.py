"""Random numbers: one seed for all, states that a checkpoint can hold."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dgavg.distributed import rank, ranks
from dgavg.errors import require

CPU = torch.device("cpu")


def seed_everything(seed: int) -> None:
    """Seed `random`, NumPy's global generator and torch on every device; choose cuDNN's
    deterministic kernels."""
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_own(seed: int) -> None:
    """Give every process but the first draws of its own, as for dropout, from here on."""
    if rank():
        words = np.random.SeedSequence([seed, rank()]).generate_state(1)
        seed_everything(int(words[0]))


def random_state(device: torch.device = CPU) -> dict[str, Any]:
    """The state of every global generator that a run on `device` draws from.

    As tensors, numbers and lists alone.
    """
    version, keys, gauss = random.getstate()
    _, words, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(keys), gauss],
        "numpy": [np.asarray(words).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "mps": torch.mps.get_rng_state() if device.type == "mps" else None,
    }


def set_random_state(saved: dict[str, Any], device: torch.device = CPU) -> None:
    """Restore what `random_state` gave."""
    version, keys, gauss = saved["python"]
    random.setstate((version, tuple(keys), gauss))
    words, position, has_gauss, cached = saved["numpy"]
    np.random.set_state(("MT19937", np.array(words, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(saved["torch"].cpu())
    if saved["cuda"] is not None:
        torch.cuda.set_rng_state(saved["cuda"].cpu(), device)
    if saved["mps"] is not None:
        torch.mps.set_rng_state(saved["mps"].cpu())


def random_states(device: torch.device = CPU) -> Any:
    """`random_state`; where several processes train together a list of all of theirs.

    Then all must call this.
    """
    own = random_state(device)
    if ranks() == 1:
        return own
    found: list[Any] = [None] * ranks()
    dist.all_gather_object(found, own)
    return found


def set_random_states(saved: Any, device: torch.device = CPU) -> None:
    """Restore what `random_states` gave.

    Raises `UserError` where that was on another number of processes.
    """
    each = saved if isinstance(saved, list) else [saved]
    check_processes("the checkpoint", len(each))
    set_random_state(each[rank()], device)


def check_processes(what: str, wanted: int) -> None:
    """Raise `UserError` where `what` is of a run on `wanted` processes, and here are others."""
    start = f"torchrun --nproc-per-node {wanted}" if wanted > 1 else "one process, no torchrun"
    require(
        wanted == ranks(),
        f"{what} is of a run on {wanted} process{'es' * (wanted > 1)}, here {ranks()}: go on with "
        f"{start}",
    )
