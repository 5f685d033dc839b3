"""MMD: the features of all domains shall have the same distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from dgavg.batch import Batch, Loss
from dgavg.run import Run
from dgavg.trainer import Trainer, trainer
from dgavg.trainers.loss.checks import check_weight

GAMMAS = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)  # one over the squared widths of the kernels


@trainer("mmd", min_domains=2, stackable=True)
class MMD(Trainer):
    """MMD: equal distributions of the features, by Gaussian kernels (Li et al. 2018, CVPR).

    Adds weight · mean over pairs of domains of K̄ᵢᵢ + K̄ⱼⱼ − 2·K̄ᵢⱼ, where K̄ is the mean of the
    kernel k(a, b) = Σ_γ exp(−γ‖a − b‖²), γ = 1e-3, 1e-2, …, 1e3, over all rows a of the one and b
    of the other domain, a row with itself included. As in DomainBed: the autoencoder of the paper
    is left out. DomainBed's features are of one forward pass a domain, ours of one for all, which
    is another thing with batch norm.

    - `weight` (1; usual 0.1 to 10).

    Cost: no pass; at the peak eleven matrices of N² numbers, for a batch of N rows. No loop over
    pairs: one matrix of distances serves them all.

    Avoid: domains whose classes are unevenly spread, since features that tell classes apart then
    differ between domains and are punished; and features whose squared distances all lie far
    outside 1e-3 to 1e3, where every kernel is flat and there is no gradient.
    """

    weight: float = 1.0

    def validate(self) -> None:
        """Refuse settings out of range."""
        check_weight("mmd", self.weight)

    def loss(self, run: Run, batch: Batch) -> Loss:
        """Add the penalty."""
        out = self.inner.loss(run, batch)
        out.terms["mmd"] = self.weight * penalty(out.features, batch.domains)
        return out


def penalty(features: Tensor, domains: int) -> Tensor:
    """The penalty of features (N, F), as many rows a domain, ordered by domain; a scalar.

    With M the means of the kernel's blocks, the mean over pairs of Mᵢᵢ + Mⱼⱼ − 2Mᵢⱼ is
    2/(D(D − 1)) · (D · tr M − Σ M), so no pair is ever formed.
    """
    rows = len(features) // domains
    means = kernel(features).view(domains, rows, domains, rows).mean(dim=(1, 3))
    return 2 / (domains * (domains - 1)) * (domains * means.trace() - means.sum())


def kernel(features: Tensor) -> Tensor:
    """The sum of all Gaussian kernels between the rows of features (N, F): (N, N)."""
    centred = features - features.detach().mean(dim=0)  # smaller numbers, the same distances
    norms = centred.square().sum(dim=1)
    distances = norms[:, None] + norms - 2 * centred @ centred.T
    distances = distances.clamp(min=0)
    total = torch.exp(-GAMMAS[0] * distances)
    for gamma in GAMMAS[1:]:
        total = total + torch.exp(-gamma * distances)
    return total
