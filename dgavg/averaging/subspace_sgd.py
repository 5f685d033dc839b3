"""SubspaceSGD: the coefficients of a WeightSubspace, trained by projected gradients."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dgavg.averaging.subspace import Gradients, WeightSubspace


class SubspaceSGD:
    """Stochastic gradient descent on the coefficients of a `WeightSubspace`.

    With w = mean + Pᵀβ the weights and g their gradient, a step is

        v ← momentum·v + P(g + weight_decay·w) + reg·β,    β ← β − lr·v,

    which is SGD on the weights with every step projected on the span. Momentum and weight decay
    through the origin (`centred=False`) are the authors' rule, to rounding that of
    `torch.optim.SGD` on projected gradients; `reg` alone is dicee's, which draws towards the mean
    of the samples. In a centred subspace weight decay has the part that lies inside.

    All of it happens in coefficients, (K,) numbers, so neither state nor result depends on which
    basis was found. `lr` may be changed between steps. A new sample forgets the velocity.

    Raises `ValueError` for settings out of range.
    """

    def __init__(
        self,
        subspace: WeightSubspace,
        *,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        reg: float = 0.0,
    ) -> None:
        if not lr > 0:
            raise ValueError(f"lr={lr}: a number above 0")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum}: a number in [0, 1)")
        for name, value in (("weight_decay", weight_decay), ("reg", reg)):
            if not value >= 0:
                raise ValueError(f"{name}={value}: a number from 0 on")
        self.subspace, self.lr, self.momentum = subspace, lr, momentum
        self.weight_decay, self.reg = weight_decay, reg
        self.velocity = torch.zeros(0, dtype=torch.float64)
        self._basis: Tensor | None = None  # that of the samples which the velocity belongs to
        self._mean = torch.zeros(0, dtype=torch.float64)

    def step(self, gradients: Gradients) -> None:
        """New coefficients from the gradient at the average; see `WeightSubspace.project`."""
        slopes, basis = self.subspace.project(gradients), self.subspace.basis()
        if basis is not self._basis:
            self._begin(basis)
        coefficients = self.subspace.coefficients
        moved = coefficients - 1.0 / len(coefficients)
        direction = basis @ (slopes + self.weight_decay * self._mean)
        direction += (self.weight_decay + self.reg) * moved
        self.velocity = self.momentum * self.velocity + direction
        self.subspace.coefficients = coefficients - self.lr * self.velocity

    def _begin(self, basis: Tensor) -> None:
        restored = self._basis is None and len(self.velocity) == len(basis)
        if not restored:
            self.velocity = torch.zeros(len(basis), dtype=torch.float64)
        self._basis, self._mean = basis, torch.zeros(basis.shape[1], dtype=torch.float64)
        if self.weight_decay:
            self._mean = self.subspace.projected_mean()

    def state_dict(self) -> dict[str, Tensor]:
        """The velocity; the coefficients are in the state of the subspace."""
        return {"velocity": self.velocity.clone()}

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` gave; the subspace restores its own."""
        self.velocity, self._basis = saved["velocity"].to("cpu", copy=True), None
