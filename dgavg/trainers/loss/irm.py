"""IRM: the risk of every domain shall have no slope at the common classifier."""

from __future__ import annotations

from torch import Tensor

from dgavg.batch import Batch, Loss
from dgavg.errors import require
from dgavg.run import Run
from dgavg.trainer import Trainer, fixed, state, trainer
from dgavg.trainers.loss.anneal import annealed, jump_of, reset_at
from dgavg.trainers.loss.checks import check_rows, check_weight


@trainer("irm", stackable=True)
class IRM(Trainer):
    """Invariant risk minimization, the IRMv1 penalty (Arjovsky et al. 2019, arXiv 1907.02893).

    Adds weight · mean over domains of g₁·g₂, where g₁ and g₂ are the slopes of the risk in a factor
    on the logits at 1, over the even and the odd rows: an unbiased estimate of the squared slope.

    - `weight` (100; usual 0.1 to 1e5).
    - `anneal` (500): a step, or below 1 a share of the run, up to which the weight is 1 instead,
      whatever `weight` is; then the optimizer's moments are reset, as in DomainBed. 0 for neither,
      and neither where `weight` follows a schedule.

    Cost: no pass beyond the forward pass; the slopes have a closed form. Pays where a feature
    predicts well in every training domain with different strength (ColoredMNIST, with the oracle
    rule).

    Avoid: photographs, where it is rarely better than `basic`; a large weight from the first step
    on, which stops learning.
    """

    weight: float = 100.0
    anneal: float = fixed(500)
    jump: int = state(int)

    def validate(self) -> None:
        """Refuse settings out of range."""
        check_weight("irm", self.weight)
        require(self.anneal >= 0, f"trainer.irm.anneal={self.anneal}: a number from 0 on")

    def loss(self, run: Run, batch: Batch) -> Loss:
        """Add the penalty."""
        out = self.inner.loss(run, batch)
        weight = annealed(run, self.weight, self.jump)
        out.terms["irm"] = weight * penalty(out.logits, out.batch)
        return out

    def setup(self, run: Run) -> None:
        """Find the step of the jump; refuse batches that have no two halves."""
        self.jump = jump_of(self, run)
        check_rows("irm", run)

    def after_step(self, run: Run) -> None:
        """Reset the optimizer where the weight jumps."""
        reset_at(run, self.jump)


def penalty(logits: Tensor, batch: Batch) -> Tensor:
    """Mean over domains of the product of the two half-batch slopes; a scalar.

    The slope of the cross-entropy of s·z in s at 1 is Σ_k (softmax(z)_k − y_k)·z_k.
    """
    expected = (logits.softmax(dim=1) * logits).sum(dim=1)
    if batch.y.is_floating_point():
        actual = (batch.y * logits).sum(dim=1)
    else:
        actual = logits.gather(1, batch.y[:, None]).squeeze(1)
    slopes = batch.by_domain(expected - actual)
    return (slopes[:, 0::2].mean(dim=1) * slopes[:, 1::2].mean(dim=1)).mean()
