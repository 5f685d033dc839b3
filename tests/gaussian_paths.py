"""Weights on the way, posteriors of them, and the deviations of the definition."""

from __future__ import annotations

import numpy as np
import torch

from dgavg.averaging.gaussian import GaussianPosterior


def walk(updates, size, seed=0, mean=1.0, std=0.3):
    """Float32 weights on the way, (updates, size)."""
    random = np.random.default_rng(seed)
    return (mean + std * random.normal(size=(updates, size))).astype(np.float32)


def collected(path, **options):
    live = {"w": torch.zeros(path.shape[1])}
    posterior = GaussianPosterior(live, **options)
    for row in path:
        live["w"].copy_(torch.from_numpy(row))
        posterior.update(live)
    return posterior


def plain_deviations(path, rank):
    """w − mean at the time, in float64, one row for each slot of the ring."""
    path = path.astype(np.float64)
    rows = np.zeros((rank, path.shape[1]))
    for i, row in enumerate(path):
        rows[i % rank] = row - path[: i + 1].mean(axis=0)
    return rows


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def shake(model, seed):
    """New values for everything, in place; a copy of them."""
    random = seeded(seed)
    for tensor in {id(t): t for t in model.state_dict().values()}.values():
        kind = tensor.dtype if tensor.is_complex() else torch.float32
        tensor.copy_(torch.randn(tensor.shape, generator=random, dtype=kind) * 10)
    return {k: v.clone() for k, v in model.state_dict().items()}
