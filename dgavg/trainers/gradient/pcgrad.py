"""PCGrad: domains whose gradients conflict give way to each other."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dgavg.batch import Batch, Loss
from dgavg.run import Run
from dgavg.trainer import Trainer, trainer
from dgavg.trainers.gradient.passes import domain_gradients


@trainer("pcgrad", min_domains=2, compares_gradients=True)
class PCGrad(Trainer):
    """PCGrad: projects conflicting gradients, a task a domain (Yu et al. 2020, arXiv 2001.06782).

    Each domain's gradient g_i loses, for every other domain j in random order, its part along g_j
    where the two conflict: if g_i·g_j < 0, g_i ← g_i − (g_i·g_j/‖g_j‖²)·g_j. The optimizer steps
    with their mean; the paper takes the sum, which is the same for Adam. All parameters are one
    vector. Terms of penalties are part of every gradient.

    Cost: one forward pass and a backward pass a domain; all domains' gradients in memory at once.
    Where `sam` or the like stands further in, its passes once a domain. The projections are done on
    the domains' dot products, so their number is of no weight.

    Avoid: where gradients hardly conflict, as those of similar domains: it is `basic` at a higher
    price.
    """

    def grad(self, run: Run, batch: Batch) -> Loss:
        """The mean of the projected gradients."""
        found = domain_gradients(self, run, batch)
        share = shares(found.rows @ found.rows.T, orders(run.random("pcgrad"), batch.domains))
        return found.write(share.to(found.rows.dtype) @ found.rows)


def orders(random: np.random.Generator, domains: int) -> list[list[int]]:
    """For each domain, the others in random order."""
    return [
        random.permutation([j for j in range(domains) if j != i]).tolist() for i in range(domains)
    ]


def shares(products: Tensor, orders: list[list[int]]) -> Tensor:
    """How much of each gradient the mean of the projected ones holds; (domains,) in float64.

    `products` (domains, domains) are the dot products of all gradients; `orders[i]` those that
    gradient i is projected on, one after the other.
    """
    products = products.double()
    own = torch.eye(len(products), dtype=products.dtype, device=products.device)
    held = own.clone()  # row i: what projected gradient i is made of
    lengths = products.diagonal().clamp(min=torch.finfo(products.dtype).tiny)
    for step in zip(*orders, strict=True):  # one projection of every gradient
        onto = torch.stack([own[j] for j in step])
        along = (held @ products * onto).sum(dim=1)  # product of projected i and its j
        held = held - (along.clamp(max=0) / (onto @ lengths))[:, None] * onto
    return held.mean(dim=0)
