"""IB-ERM: features shall vary as little as the task allows."""

from __future__ import annotations

from torch import Tensor

from dgavg.batch import Batch, Loss
from dgavg.errors import require
from dgavg.run import Run
from dgavg.trainer import Trainer, fixed, state, trainer
from dgavg.trainers.loss.anneal import annealed, jump_of, reset_at
from dgavg.trainers.loss.checks import check_rows, check_weight


@trainer("iberm", stackable=True)
class IBERM(Trainer):
    """IB-ERM: an information bottleneck on the features (Ahuja et al. 2021, arXiv 2106.06607).

    Adds weight · mean over domains of the mean, over all features, of their variance in the
    domain's rows (divided by rows − 1), as in DomainBed. The paper bounds the entropy of the
    features; the variance stands in for it.

    - `weight` (100; usual 0.1 to 1e5).
    - `anneal` (500): a step, or below 1 a share of the run, up to which there is no penalty; then
      the optimizer's moments are reset. 0 for a penalty from the first step.

    Cost: no pass, no memory beyond the forward pass.

    Avoid: runs without weight decay on the classifier: features may then shrink while its weights
    grow to make up for it, which lowers the penalty and changes no prediction.
    """

    weight: float = 100.0
    anneal: float = fixed(500)
    jump: int = state(int)

    def validate(self) -> None:
        """Refuse settings out of range."""
        check_weight("iberm", self.weight)
        require(self.anneal >= 0, f"trainer.iberm.anneal={self.anneal}: a number from 0 on")

    def setup(self, run: Run) -> None:
        """Find the step of the jump; refuse batches that have no variance."""
        self.jump = jump_of(self, run)
        check_rows("iberm", run)

    def loss(self, run: Run, batch: Batch) -> Loss:
        """Add the penalty."""
        out = self.inner.loss(run, batch)
        weight = annealed(run, self.weight, self.jump, before=0.0)
        out.terms["iberm"] = weight * penalty(batch.by_domain(out.features))
        return out

    def after_step(self, run: Run) -> None:
        """Reset the optimizer where the weight jumps."""
        reset_at(run, self.jump)


def penalty(features: Tensor) -> Tensor:
    """The mean variance, within domains, of features (domains, rows, F); a scalar."""
    return features.var(dim=1).mean()
