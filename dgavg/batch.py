"""Batch and Loss: what flows down and up a chain."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True)
class Batch:
    """One training batch: the same number of rows of each training domain, ordered by domain.

    Shapes: `x` (N, ...) inputs; `y` (N,) integer labels, or (N, classes) probabilities once a link
    has mixed them; `d` (N,) the domain index of each row; `domains` how many domains there are. So
    work per domain is a reshape to (domains, N / domains, ...), never a mask or a host sync.
    `weights` (domains,) is how the domains' risks are averaged, evenly where it is None: a gradient
    link that wants one domain's gradient from the whole batch sets it. A link that makes a batch
    of another keeps them with `dataclasses.replace`.
    """

    x: Tensor
    y: Tensor
    d: Tensor
    domains: int
    weights: Tensor | None = None

    def by_domain(self, rows: Tensor) -> Tensor:
        """View (N, ...) as (domains, N / domains, ...)."""
        return rows.reshape(self.domains, -1, *rows.shape[1:])

    def split(self) -> list[Batch]:
        """One batch for each domain, in order."""
        parts = zip(*(self.by_domain(t) for t in (self.x, self.y, self.d)), strict=True)
        found = [Batch(x, y, d, domains=1) for x, y, d in parts]
        if self.weights is not None:
            for i, part in enumerate(found):
                part.weights = self.domains * self.weights[i : i + 1]
        return found


@dataclass(slots=True)
class Loss:
    """What one forward pass gave, shared by every penalty of the chain.

    Where several processes train together, it is the loss of the rows of all: `batch` then has the
    labels and domains of all rows, in the order of `logits`, but of `x` this process's own alone.

    Shapes: `risks` (D,) mean task loss of each domain; `weights` (D,) how the risks are averaged;
    `logits` (N, classes) and `features` (N, F) in float32; `terms` scalar penalties by link name,
    already weighted.
    """

    risks: Tensor
    weights: Tensor
    logits: Tensor
    features: Tensor
    batch: Batch
    terms: dict[str, Tensor] = field(default_factory=dict)

    @property
    def total(self) -> Tensor:
        """The scalar to minimise: weighted risks plus all terms."""
        return sum(self.terms.values(), torch.dot(self.weights, self.risks))
