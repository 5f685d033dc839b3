"""VREx: the risks of all domains shall be equal."""

from __future__ import annotations

from dgavg.batch import Batch, Loss
from dgavg.errors import require
from dgavg.run import Run
from dgavg.trainer import Schedule, Trainer, trainer


@trainer("vrex", min_domains=2)
class VREx(Trainer):
    """Risk extrapolation: the variance of the domains' risks (Krueger et al. 2021, 2003.00688).

    Adds weight · mean over domains of (risk − mean risk)².

    - `weight` (10; usual 0.1 to 1e5).
    - `anneal` (500): steps in which the weight is 1 instead; then the optimizer's moments are
      reset, as in DomainBed.

    Cost: none beyond the forward pass. Pays where domains differ in how well a spurious feature
    predicts (ColoredMNIST, with the oracle rule); it hurts where some domain is simply harder.
    """

    weight: Schedule = 10.0
    anneal: int = 500

    def validate(self) -> None:
        """Refuse settings out of range."""
        require(self.anneal >= 0, f"trainer.vrex.anneal={self.anneal}: a number of steps from 0 on")

    def loss(self, run: Run, batch: Batch) -> Loss:
        """Add the penalty."""
        out = self.inner.loss(run, batch)
        weight = run.at(self.weight) if run.t >= self.anneal else 1.0
        out.terms["vrex"] = weight * out.risks.var(correction=0)
        return out

    def after_step(self, run: Run) -> None:
        """Reset the optimizer where the weight jumps."""
        if run.t == self.anneal:
            run.reset_optimizer()
