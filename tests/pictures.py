"""Noisy pictures that can be learnt: data of any domains, the same each time."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dgavg.data import Domain, DomainDataset


def pictures(
    sizes: Mapping[str, int], title: str = "toy", *, noise: float = 0.65, seed: int = 5
) -> DomainDataset:
    """8×8 pictures of 3 classes, as many a domain as `sizes` says; `noise` is its share in them."""
    rng = torch.Generator().manual_seed(seed)
    prototypes = torch.rand(3, 1, 8, 8, generator=rng)
    domains = []
    for name, n in sizes.items():
        labels = torch.arange(n) % 3
        random = torch.rand(n, 1, 8, 8, generator=rng)
        images = 255 * ((1 - noise) * prototypes[labels] + noise * random)
        domains.append(Domain(name, images.to(torch.uint8), labels))
    return DomainDataset(title, tuple(domains), ("a", "b", "c"))
