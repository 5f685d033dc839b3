"""SAM: the gradient at the worst point nearby."""

from __future__ import annotations

import torch

from dgavg.batch import Batch, Loss
from dgavg.errors import require
from dgavg.run import Run
from dgavg.trainer import Trainer, trainer
from dgavg.trainers.gradient.passes import moved, norm_of, with_gradient


@trainer("sam")
class SAM(Trainer):
    """SAM: sharpness-aware minimization (Foret et al. 2021, arXiv 2010.01412).

    Takes the gradient g, moves the weights to w + rho·g/‖g‖, takes the gradient there, and puts the
    weights back; the optimizer steps from w with the second gradient. What other links train beside
    the model moves along, and counts in ‖g‖. Batch-norm statistics are those of the first pass. The
    loss it reports is the one at w. Every penalty of the chain counts in both passes; dropout draws
    anew in the second.

    - `rho` (0.05; usual 0.01 to 0.5): the radius; 0 is no SAM at all.

    Cost: twice the passes of the chain below, one more copy of the weights.

    Avoid: where a step's time counts. Averages of the weights find flat minima at a fraction of
    the cost.
    """

    rho: float = 0.05

    def validate(self) -> None:
        """Refuse settings out of range."""
        require(self.rho >= 0, f"trainer.sam.rho={self.rho}: a number from 0 on")

    def grad(self, run: Run, batch: Batch) -> Loss:
        """The gradient at w + rho·g/‖g‖."""
        first = self.inner.grad(run, batch)
        if self.rho == 0:
            return first
        weights, slopes = with_gradient(run)
        scale = self.rho / (norm_of(slopes) + 1e-12)
        with moved(run, weights, torch._foreach_mul(slopes, scale)):
            self.inner.grad(run, batch)
        return first
