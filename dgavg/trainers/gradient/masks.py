"""What masks of the gradient have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from dgavg.batch import Loss
from dgavg.trainers.gradient.passes import DomainGradients


def agreement(rows: Tensor) -> Tensor:
    """How far the signs of rows (domains, P) agree: |mean sign| in [0, 1], of shape (P,)."""
    return rows.sign().mean(dim=0).abs()


def write_masked(found: DomainGradients, mask: Tensor) -> Loss:
    """Make mask (P,) times the mean gradient, over the mask's mean in each tensor, the gradient."""
    parts = found.split(mask)
    sums = torch._foreach_norm(parts, 1)
    row = mask * found.rows.mean(dim=0)
    shares = [s / part.numel() + 1e-10 for s, part in zip(sums, parts, strict=True)]
    torch._foreach_div_(found.split(row), shares)
    return found.write(row)
