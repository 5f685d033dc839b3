"""CORAL: the features of all domains shall have the same mean and covariance."""

from __future__ import annotations

from torch import Tensor

from dgavg.batch import Batch, Loss
from dgavg.run import Run
from dgavg.trainer import Trainer, trainer
from dgavg.trainers.loss.checks import check_rows, check_weight


@trainer("coral", min_domains=2, stackable=True)
class CORAL(Trainer):
    """Correlation alignment of the domains' features (Sun and Saenko 2016, arXiv 1607.01719).

    Adds weight · mean over pairs of domains of mean (μᵢ − μⱼ)² + mean (Σᵢ − Σⱼ)², with mean and
    covariance of the features of each domain's rows, as DomainBed extends it to several domains.

    - `weight` (1; usual 0.1 to 10).

    Cost: no pass beyond the forward pass; one covariance of the features a domain. No loop over
    pairs. A strong baseline on photographs.

    Avoid: classes that are unevenly spread over the domains: aligned features then mix them up.
    """

    weight: float = 1.0

    def validate(self) -> None:
        """Refuse settings out of range."""
        check_weight("coral", self.weight)

    def loss(self, run: Run, batch: Batch) -> Loss:
        """Add the penalty."""
        out = self.inner.loss(run, batch)
        out.terms["coral"] = self.weight * penalty(batch.by_domain(out.features))
        return out

    def setup(self, run: Run) -> None:
        """Refuse batches that have no covariance."""
        check_rows("coral", run)


def penalty(features: Tensor) -> Tensor:
    """The penalty of features (domains, rows, F); a scalar.

    The mean over pairs of ‖aᵢ − aⱼ‖² is 2/(D − 1)·Σ‖aᵢ − ā‖², so no pair is ever formed.
    """
    domains, rows, _ = features.shape
    mean = features.mean(dim=1, keepdim=True)
    centred = features - mean
    covariance = centred.transpose(1, 2) @ centred / (rows - 1)
    spread = [(s - s.mean(dim=0)).square().sum(dim=0).mean() for s in (mean, covariance)]
    return 2 / (domains - 1) * (spread[0] + spread[1])
