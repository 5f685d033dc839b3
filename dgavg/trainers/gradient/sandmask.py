"""SAND-mask: what domains agree on is learned, the more the closer they are."""

from __future__ import annotations

import torch
from torch import Tensor

from dgavg.batch import Batch, Loss
from dgavg.errors import require
from dgavg.run import Run
from dgavg.trainer import Trainer, trainer
from dgavg.trainers.gradient.masks import agreement, write_masked
from dgavg.trainers.gradient.passes import domain_gradients


@trainer("sandmask", min_domains=2, compares_gradients=True)
class SANDMask(Trainer):
    """SAND-mask: a smooth AND-mask by sign and variance (Shahtalebi et al. 2021, arXiv 2106.02266).

    With g_d the gradient of domain d, an entry's mask is
    max(0, tanh(k/Var_d(g_d)·(|mean_d sign g_d| − tau))); the gradient is
    mask·mean_d g_d / mean(mask), the last mean over each tensor, with the unbiased variance, as in
    DomainBed. DomainBed's own default is a `tau` of 1, at which its mask is 0 everywhere and
    nothing is learned (its search draws from 0 to 1): here it is 0.5, and 1 is refused.

    - `tau` (0.5; usual 0 to 1): the agreement above which an entry is kept.
    - `k` (10; usual 0.001 to 1e5): how steeply the mask rises; steeper is nearer to `andmask`.

    Cost: one forward pass and a backward pass a domain; all domains' gradients in memory at once.
    Where `sam` or the like stands further in, its passes once a domain.

    Avoid: a small `k` on small gradients. A variance of 1e-8 makes the mask that of `andmask`
    already.
    """

    tau: float = 0.5
    k: float = 10.0

    def validate(self) -> None:
        """Refuse settings out of range."""
        require(
            0 <= self.tau < 1,
            f"trainer.sandmask.tau={self.tau}: a number in [0, 1); at 1 nothing is learned",
        )
        require(self.k > 0, f"trainer.sandmask.k={self.k}: a number above 0")

    def grad(self, run: Run, batch: Batch) -> Loss:
        """The masked gradient."""
        found = domain_gradients(self, run, batch)
        return write_masked(found, mask(found.rows, self.tau, self.k))


def mask(rows: Tensor, tau: float, k: float) -> Tensor:
    """The mask of rows (domains, P); of shape (P,).

    Where all domains have one value, the variance is 0: 1 above tau, 0 below, and 0 at tau.
    """
    # rows.var(dim=0) takes seven times as long
    variance = (rows - rows.mean(dim=0)).square_().sum(dim=0) / (len(rows) - 1)
    steep = k * (agreement(rows) - tau) / variance
    return torch.tanh(steep).clamp(min=0).nan_to_num(nan=0.0)
