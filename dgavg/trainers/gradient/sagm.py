"""SAGM: the gradients at w and at the worst point nearby shall agree."""

from __future__ import annotations

import torch

from dgavg.batch import Batch, Loss
from dgavg.errors import require
from dgavg.run import Run
from dgavg.trainer import Trainer, trainer
from dgavg.trainers.gradient.passes import moved, norm_of, with_gradient


@trainer("sagm")
class SAGM(Trainer):
    """SAGM: sharpness-aware gradient matching (Wang et al. 2023, arXiv 2303.10353).

    With g the gradient at w and g' that at w + (rho/‖g‖ − alpha)·g, the optimizer steps with
    ½g + ½g'. The step back by alpha·g makes the two gradients agree in the long run. The paper sums
    them; the authors' code, as here, takes the mean. Batch-norm statistics and the loss reported
    are those at w.

    - `rho` (0.05; usual 0.01 to 0.1): the radius.
    - `alpha` (0.001; usual 0.001 to 0.1): how far the second point goes back.

    Cost: twice the passes of the chain below, one more copy of the weights and one of the
    gradient.

    Avoid: where a step's time counts, and beside `sam` or `gsam`, which do the same by other means.
    """

    rho: float = 0.05
    alpha: float = 0.001

    def validate(self) -> None:
        """Refuse settings out of range."""
        for name in ("rho", "alpha"):
            value = getattr(self, name)
            require(value >= 0, f"trainer.sagm.{name}={value}: a number from 0 on")

    def grad(self, run: Run, batch: Batch) -> Loss:
        """The mean of both gradients."""
        first = self.inner.grad(run, batch)
        if self.rho == self.alpha == 0:
            return first
        weights, slopes = with_gradient(run)
        scale = self.rho / (norm_of(slopes) + 1e-12) - self.alpha
        with moved(run, weights, torch._foreach_mul(slopes, scale)):
            self.inner.grad(run, batch)
        for weight, slope in zip(weights, slopes, strict=True):
            if weight.grad is not None:
                weight.grad = torch.lerp(weight.grad, slope, 0.5)
        return first
