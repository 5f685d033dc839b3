"""Random numbers: one seed for all, states that a checkpoint can hold."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

CPU = torch.device("cpu")


def seed_everything(seed: int) -> None:
    """Seed `random`, NumPy's global generator and torch on every device; choose cuDNN's
    deterministic kernels."""
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


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
