"""GSAM: SAM's gradient, less what would only widen the gap to the worst point."""

from __future__ import annotations

import torch
from torch import Tensor

from dgavg.batch import Batch, Loss
from dgavg.errors import require
from dgavg.run import Run
from dgavg.trainer import Trainer, trainer
from dgavg.trainers.gradient.passes import moved, norm_of, with_gradient


@trainer("gsam")
class GSAM(Trainer):
    """GSAM: SAM that also narrows the surrogate gap (Zhuang et al. 2022, arXiv 2203.08065).

    With g the gradient at w and g' that at w + rho·g/‖g‖, the optimizer steps with g' − alpha·g⊥,
    where g⊥ = g − (g·g'/‖g'‖²)·g' is the part of g orthogonal to g'. Batch-norm statistics and the
    loss reported are those at w. The paper lets the radius fall with the learning rate:
    rho_min + (rho − rho_min)·lr/(the optimizer's lr), for a schedule that ends at 0; so does this
    link where `rho_min` is given. The reference code's element-wise scaling (ASAM) is left out.

    - `rho` (0.05; usual 0.01 to 0.5): the radius at the full learning rate; 0 is no GSAM at all.
    - `rho_min` (none; usual 0 to `rho`): the radius at a learning rate of 0; without it, constant.
    - `alpha` (0.2; usual 0.01 to 0.4): weight of g⊥, that of the reference code; 0 is `sam`.

    Cost: twice the passes of the chain below, one more copy of the weights and one of the
    gradient.

    Avoid: where a step's time counts, and beside `sam` or `sagm`, which it contains.
    """

    rho: float = 0.05
    rho_min: float | None = None
    alpha: float = 0.2

    def validate(self) -> None:
        """Refuse settings out of range."""
        for name in ("rho", "rho_min", "alpha"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"trainer.gsam.{name}={value}: a number from 0 on")
        require(
            self.rho_min is None or self.rho_min <= self.rho,
            f"trainer.gsam.rho_min={self.rho_min}: at most rho, {self.rho}",
        )

    def grad(self, run: Run, batch: Batch) -> Loss:
        """The gradient at the worst point nearby, less alpha of the first one's other part."""
        first = self.inner.grad(run, batch)
        rho = self.radius(run)
        if rho == 0:
            return first
        weights, slopes = with_gradient(run)
        scale = rho / (norm_of(slopes) + 1e-12)
        with moved(run, weights, torch._foreach_mul(slopes, scale)):
            self.inner.grad(run, batch)
        there = [(w, g) for w, g in zip(weights, slopes, strict=True) if w.grad is not None]
        found = less_orthogonal([g for _, g in there], [_grad(w) for w, _ in there], self.alpha)
        for (weight, _), gradient in zip(there, found, strict=True):
            weight.grad = gradient
        return first

    def radius(self, run: Run) -> float:
        """The radius at the learning rate of this step."""
        if self.rho_min is None:
            return self.rho
        return self.rho_min + (self.rho - self.rho_min) * run.lr() / run.base_lr


def less_orthogonal(first: list[Tensor], second: list[Tensor], alpha: float) -> list[Tensor]:
    """`second` less alpha times the part of `first` that is orthogonal to it; new tensors."""
    products = [torch.dot(a.flatten(), b.flatten()) for a, b in zip(first, second, strict=True)]
    along = torch.stack(products).sum() / norm_of(second).square().clamp(min=1e-30)
    scaled = torch._foreach_mul(second, 1 + alpha * along)
    return list(torch._foreach_sub(scaled, first, alpha=alpha))


def _grad(weight: Tensor) -> Tensor:
    assert weight.grad is not None
    return weight.grad
