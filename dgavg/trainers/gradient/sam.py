"""SAM: the gradient at the worst point nearby."""

from __future__ import annotations

import torch
from torch import Tensor

from dgavg.averaging.batchnorm import batchnorm_layers
from dgavg.batch import Batch, Loss
from dgavg.errors import require
from dgavg.run import Run
from dgavg.trainer import Trainer, trainer


@trainer("sam")
class SAM(Trainer):
    """Sharpness-aware minimization (Foret et al. 2021, arXiv 2010.01412).

    Takes the gradient g, moves the weights to w + rho·g/‖g‖, takes the gradient there, and puts the
    weights back; the optimizer steps from w with the second gradient. Batch-norm statistics are
    those of the first pass. The loss it reports is the one at w.

    - `rho` (0.05; usual 0.01 to 0.5): the radius; 0 is no SAM at all.

    Cost: two forward and two backward passes a step, one more copy of the weights. Every penalty of
    the chain counts in both passes; dropout draws anew in the second. Averages find flat minima at
    a fraction of the cost.
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
        weights: list[Tensor] = [p for p in run.parameters if p.grad is not None]
        with torch.no_grad():
            slopes = [p.grad for p in weights if p.grad is not None]
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(slopes)))
            before = [p.detach().clone() for p in weights]
            torch._foreach_add_(weights, torch._foreach_mul(slopes, self.rho / (norm + 1e-12)))
        parts = (run.model, run.extras)
        layers = [m for part in parts for m in batchnorm_layers(part) if m.track_running_stats]
        try:
            for layer in layers:
                layer.track_running_stats = False
            self.inner.grad(run, batch)
        finally:
            for layer in layers:
                layer.track_running_stats = True
            with torch.no_grad():
                torch._foreach_copy_(weights, before)
        return first
