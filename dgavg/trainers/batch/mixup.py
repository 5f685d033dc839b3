"""Mixup: train on blends of two images and their labels."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dgavg.batch import Batch
from dgavg.errors import require
from dgavg.run import Run
from dgavg.trainer import Trainer, trainer
from dgavg.trainers.batch.partners import check_across, every_row, partners_of, probabilities


@trainer("mixup", one_domain="across=false")
class Mixup(Trainer):
    """Mixup: trains on blends of two images and their labels (Zhang et al. 2018, arXiv 1710.09412).

    x = λxᵢ + (1 − λ)xⱼ, and the labels likewise, so the loss is λℓ(·, yᵢ) + (1 − λ)ℓ(·, yⱼ), with
    λ ~ Beta(alpha, alpha), one λ a domain. Across domains (DomainBed's Mixup) j is the row at the
    same place of another domain, the next in a random cycle of all; within domains it is a random
    row of the same one. The authors' code draws one λ and one permutation for the whole batch,
    whatever the domains; within domains that is done for each. A blended row keeps the domain of i.

    - `alpha` (0.2; usual 0.1 to 10): near 0 hardly any blending, at 1 any λ alike.
    - `across` (true): blend images of two domains; false blends within each.

    Cost: no pass, one more copy of the batch.

    Avoid: Beside a penalty that compares domains, set `across=false`: images of two domains in one
    blur what tells the domains apart.
    """

    alpha: float = 0.2
    across: bool = True

    @property
    def min_domains(self) -> int:  # type: ignore[override]  # of other links a constant
        """Two domains where rows are mixed across them."""
        return 2 if self.across else 1

    def validate(self) -> None:
        """Refuse settings out of range."""
        require(self.alpha > 0, f"trainer.mixup.alpha={self.alpha}: a number above 0")

    def prepare(self, run: Run, batch: Batch) -> Batch:
        """Blend the batch; labels become probabilities (N, classes)."""
        batch = self.inner.prepare(run, batch)
        check_across("mixup", self.across, batch.domains)
        random = run.random("mixup")
        partner = partners_of(random, batch, self.across)
        share = torch.from_numpy(random.beta(self.alpha, self.alpha, batch.domains))

        def blend(rows: Tensor) -> Tensor:
            return torch.lerp(rows[partner], rows, every_row(share, batch, rows.dim()).to(rows))

        return replace(batch, x=blend(batch.x), y=blend(probabilities(batch, run.classes)))
