"""Mixup: train on blends of two images and their labels."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from dgavg.batch import Batch
from dgavg.errors import require
from dgavg.run import Run
from dgavg.trainer import Trainer, trainer


@trainer("mixup", min_domains=2)
class Mixup(Trainer):
    """Inter-domain mixup (Zhang et al. 2018, arXiv 1710.09412; across domains as in DomainBed).

    Each domain's rows are blended with those of another, the next one in a random cycle of all
    domains: x = λxᵢ + (1 − λ)xⱼ with one λ ~ Beta(alpha, alpha) a pair, and the labels likewise, so
    the loss is λℓ(·, yᵢ) + (1 − λ)ℓ(·, yⱼ). A blended row keeps the domain index i.

    - `alpha` (0.2; usual 0.1 to 10): near 0 hardly any blending, at 1 any λ alike.

    Cost: none. Helps most on photographs of objects; it blurs what tells domains apart, so think
    twice before putting a penalty that compares domains beside it.
    """

    alpha: float = 0.2

    def validate(self) -> None:
        """Refuse settings out of range."""
        require(self.alpha > 0, f"trainer.mixup.alpha={self.alpha}: a number above 0")

    def prepare(self, run: Run, batch: Batch) -> Batch:
        """Blend the batch; labels become probabilities (N, classes)."""
        batch = self.inner.prepare(run, batch)
        random = run.random("mixup")
        cycle = random.permutation(batch.domains)
        partner = torch.empty(batch.domains, dtype=torch.long)
        partner[torch.from_numpy(cycle)] = torch.from_numpy(cycle).roll(-1)
        share = torch.from_numpy(random.beta(self.alpha, self.alpha, batch.domains)).float()
        partner, share = (t.to(batch.x.device, non_blocking=True) for t in (partner, share))

        def blend(rows: torch.Tensor) -> torch.Tensor:
            by_domain = batch.by_domain(rows)
            mix = share.view(-1, *[1] * (by_domain.dim() - 1)).to(rows.dtype)
            return torch.lerp(by_domain[partner], by_domain, mix).flatten(0, 1)

        labels = batch.y
        if not labels.is_floating_point():
            labels = F.one_hot(labels, run.classes).to(batch.x.dtype)
        return replace(batch, x=blend(batch.x), y=blend(labels))
