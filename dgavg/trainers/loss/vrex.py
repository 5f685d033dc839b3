"""VREx: the risks of all domains shall be equal."""

from __future__ import annotations

from dgavg.batch import Batch, Loss
from dgavg.errors import require
from dgavg.run import Run
from dgavg.trainer import Trainer, fixed, state, trainer
from dgavg.trainers.loss.anneal import annealed, jump_of, reset_at
from dgavg.trainers.loss.checks import check_weight


@trainer("vrex", min_domains=2, stackable=True)
class VREx(Trainer):
    """Risk extrapolation: the variance of domain risks (Krueger et al. 2021, arXiv 2003.00688).

    Adds weight · mean over domains of (risk − mean risk)².

    - `weight` (10; usual 0.1 to 1e5).
    - `anneal` (500): a step, or below 1 a share of the run, up to which the weight is 1 instead,
      whatever `weight` is; then the optimizer's moments are reset, as in DomainBed. 0 for neither,
      and neither where `weight` follows a schedule.

    Cost: no pass beyond the forward pass. Pays where domains differ in how well a spurious feature
    predicts (ColoredMNIST, with the oracle rule).

    Avoid: domains of which one is simply harder: its risk can't be had down to the others'.
    """

    weight: float = 10.0
    anneal: float = fixed(500)
    jump: int = state(int)

    def validate(self) -> None:
        """Refuse settings out of range."""
        check_weight("vrex", self.weight)
        require(self.anneal >= 0, f"trainer.vrex.anneal={self.anneal}: a number from 0 on")

    def setup(self, run: Run) -> None:
        """Find the step of the jump."""
        self.jump = jump_of(self, run)

    def loss(self, run: Run, batch: Batch) -> Loss:
        """Add the penalty."""
        out = self.inner.loss(run, batch)
        weight = annealed(run, self.weight, self.jump)
        out.terms["vrex"] = weight * out.risks.var(correction=0)
        return out

    def after_step(self, run: Run) -> None:
        """Reset the optimizer where the weight jumps."""
        reset_at(run, self.jump)
