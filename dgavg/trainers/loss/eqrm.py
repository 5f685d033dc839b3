"""EQRM: minimise a high quantile of the domains' risks instead of their mean."""

from __future__ import annotations

import math

import torch

from dgavg.batch import Batch, Loss
from dgavg.errors import require
from dgavg.run import Run
from dgavg.trainer import Trainer, fixed, state, trainer
from dgavg.trainers.loss.anneal import reset_at
from dgavg.trainers.loss.quantile import smooth_quantile

DERIVATIVES = ("code", "exact")


@trainer("eqrm", min_domains=2)
class EQRM(Trainer):
    """EQRM: minimises a quantile of the risks (Eastwood et al. 2022, arXiv 2207.09944).

    From step `burnin` on, the loss is the alpha-quantile of a kernel density of the domains' risks,
    with Gaussian kernels of width 1.06 · σ · D^(−1/5); before, it is their mean. At `burnin` the
    optimizer's moments are reset and the learning rate falls to `rate`.

    The derivative of the quantile is, for each risk, the share of the density at the quantile that
    is its kernel's, plus its part in the width. DomainBed, and `derivative=code`, holds the place
    of the quantile between the ends of its search fixed instead, so that only the smallest risk,
    the largest, and the width have a derivative. A risk's derivative may be below 0 in both: a risk
    far below the others is raised, to narrow the kernels.

    The derivative in each risk becomes its weight, times the one it had, so other links that weigh
    domains stand beside it; the term `eqrm` in the log is a constant that makes the total the
    quantile.

    - `alpha` (0.75; usual 0.5 to 0.99): the quantile.
    - `burnin` (2500; usual 300 to 3000): a step, or below 1 a share of the run.
    - `rate` (1e-6, for a learning rate of 5e-5 before; usual 1e-7 to 1e-5): the learning rate from
      `burnin` on, times the schedules of the run; `null` leaves it as it is.
    - `derivative` (`code`): `code` or `exact`.

    Cost: no pass, no memory beyond the forward pass.

    Avoid: short runs and few domains. Without a long burn-in the risks say little yet, and a high
    quantile of two or three risks is about the largest of them.
    """

    alpha: float = 0.75
    burnin: float = fixed(2500)
    rate: float | None = 1e-6
    derivative: str = "code"
    jump: int = state(int)

    def validate(self) -> None:
        """Refuse settings out of range."""
        require(0 < self.alpha < 1, f"trainer.eqrm.alpha={self.alpha}: between 0 and 1")
        require(self.burnin >= 0, f"trainer.eqrm.burnin={self.burnin}: a number from 0 on")
        require(
            self.rate is None or 0 < self.rate < math.inf,
            f"trainer.eqrm.rate={self.rate}: a learning rate above 0, or null",
        )
        require(
            self.derivative in DERIVATIVES,
            f"trainer.eqrm.derivative={self.derivative}: choose one of {', '.join(DERIVATIVES)}",
        )

    def setup(self, run: Run) -> None:
        """Find the step at which the burn-in ends."""
        self.jump = run.step_of(self.burnin, "trainer.eqrm.burnin")

    def loss(self, run: Run, batch: Batch) -> Loss:
        """Weigh the risks by the quantile's derivative in each."""
        out = self.inner.loss(run, batch)
        out.terms["eqrm"] = out.risks.new_zeros(())
        if run.t >= self.jump:
            risks = out.risks.detach()
            found, slope = smooth_quantile(risks, self.alpha, exact=self.derivative == "exact")
            out.weights = out.weights * slope * batch.domains
            out.terms["eqrm"] = found - torch.dot(slope, risks)
        return out

    def lr(self, run: Run) -> float:
        """The inner learning rate, in the ratio of `rate` to the optimizer's from `burnin` on."""
        inner = self.inner.lr(run)
        if self.rate is None or run.t < self.jump:
            return inner
        return inner * (self.rate / run.base_lr)

    def after_step(self, run: Run) -> None:
        """Reset the optimizer where the loss changes."""
        reset_at(run, self.jump)
