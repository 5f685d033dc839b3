"""CausIRL: random mixtures of the domains shall have the same features."""

from __future__ import annotations

import torch
from torch import Tensor

from dgavg.batch import Batch, Loss
from dgavg.errors import require
from dgavg.run import Run
from dgavg.trainer import Trainer, trainer
from dgavg.trainers.loss.checks import check_rows, check_weight
from dgavg.trainers.loss.mmd import kernel


@trainer("causirl", min_domains=2)
class CausIRL(Trainer):
    """CausIRL: equal random mixtures of domains (Chevalley et al. 2022, arXiv 2206.11646).

    Each step cuts the rows of every domain in two at a random place, pools all first parts and all
    second parts, and adds weight · distance of the two pools' features. The distance is CORAL's,
    mean (μ₁ − μ₂)² + mean (Σ₁ − Σ₂)², or MMD's, K̄₁₁ + K̄₂₂ − 2·K̄₁₂ with the kernels of `mmd`. The
    cut is uniform over 0 … rows − 1, as in DomainBed, so a first part may be empty; a step with
    fewer than two rows in a pool adds nothing.

    - `weight` (1; usual 0.1 to 10).
    - `statistic` (`coral`): the distance, `coral` or `mmd`.

    Cost: no pass; two covariances (F, F), or as many matrices (N, N) as `mmd`.

    Avoid: small batches, where the two pools differ by chance more than by domain and the penalty
    is mostly noise; with many images a domain, `coral` and `mmd` compare the domains directly.
    """

    weight: float = 1.0
    statistic: str = "coral"

    def validate(self) -> None:
        """Refuse settings out of range."""
        check_weight("causirl", self.weight)
        require(
            self.statistic in DISTANCES,
            f"trainer.causirl.statistic={self.statistic}: choose one of {', '.join(DISTANCES)}",
        )

    def setup(self, run: Run) -> None:
        """Refuse batches that can't be cut."""
        check_rows("causirl", run)

    def loss(self, run: Run, batch: Batch) -> Loss:
        """Add the distance of the two pools."""
        out = self.inner.loss(run, batch)
        rows = len(out.features) // batch.domains
        cuts = run.random("causirl").integers(rows, size=batch.domains)
        chosen = torch.arange(rows) < torch.from_numpy(cuts)[:, None]  # on the CPU: nothing waits
        order = chosen.flatten().int().argsort(descending=True, stable=True)
        pooled = out.features[order.to(out.features.device, non_blocking=True)]
        first = int(cuts.sum())
        if first > 1 and len(pooled) - first > 1:
            distance = DISTANCES[self.statistic](pooled, first)
        else:
            distance = out.risks.new_zeros(())
        out.terms["causirl"] = self.weight * distance
        return out


def coral(features: Tensor, first: int) -> Tensor:
    """Squared differences of mean and covariance of the `first` rows and the rest; a scalar."""
    parts = features[:first], features[first:]
    means = [part.mean(dim=0) for part in parts]
    centred = [part - mean for part, mean in zip(parts, means, strict=True)]
    spread = [part.T @ part / (len(part) - 1) for part in centred]
    return sum((a - b).square().mean() for a, b in (means, spread))  # type: ignore[return-value]


def mmd(features: Tensor, first: int) -> Tensor:
    """The maximum mean discrepancy of the `first` rows and the rest; a scalar."""
    k = kernel(features)
    return k[:first, :first].mean() + k[first:, first:].mean() - 2 * k[:first, first:].mean()


DISTANCES = {"coral": coral, "mmd": mmd}
