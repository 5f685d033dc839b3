"""IB-IRM: IRM, and features that vary as little as the task allows."""

from __future__ import annotations

import math

from dgavg.batch import Batch, Loss
from dgavg.errors import require
from dgavg.run import Run
from dgavg.trainer import Trainer, fixed, state, trainer
from dgavg.trainers.loss import iberm, irm
from dgavg.trainers.loss.anneal import annealed, jump_of, reset_at
from dgavg.trainers.loss.checks import check_rows, check_weight


@trainer("ibirm", stackable=True)
class IBIRM(Trainer):
    """IB-IRM: IRM with an information bottleneck (Ahuja et al. 2021, arXiv 2106.06607).

    Adds irm_weight times the penalty of `irm` and weight times the variance of `iberm`. As in
    DomainBed: before its own step, IRM's part has weight 1 and the variance has weight 0, and the
    optimizer's moments are reset at each of the two steps.

    - `weight` (100; usual 0.1 to 1e5): of the variance.
    - `anneal` (500): a step, or below 1 a share of the run, up to which the variance is left alone.
    - `irm_weight` (100; usual 0.1 to 1e5): of IRM's part.
    - `irm_anneal` (500): a step, or below 1 a share of the run, up to which IRM's part has weight
      1, whatever `irm_weight` is.

    Cost: no pass, no memory beyond the forward pass.

    Avoid: where `irm` or `iberm` alone is to be avoided; and a chain that has `irm` already, since
    its penalty then counts twice.
    """

    weight: float = 100.0
    anneal: float = fixed(500)
    irm_weight: float = 100.0
    irm_anneal: float = fixed(500)
    jump: int = state(int)
    irm_jump: int = state(int)

    def validate(self) -> None:
        """Refuse settings out of range."""
        check_weight("ibirm", self.weight)
        require(
            math.isfinite(self.irm_weight) and self.irm_weight >= 0,
            f"trainer.ibirm.irm_weight={self.irm_weight}: a finite number from 0 on",
        )
        for key, value in (("anneal", self.anneal), ("irm_anneal", self.irm_anneal)):
            require(value >= 0, f"trainer.ibirm.{key}={value}: a number from 0 on")

    def setup(self, run: Run) -> None:
        """Find the steps of the jumps; refuse batches that have no two halves."""
        self.jump = jump_of(self, run)
        self.irm_jump = jump_of(self, run, "irm_anneal", "irm_weight")
        check_rows("ibirm", run)

    def loss(self, run: Run, batch: Batch) -> Loss:
        """Add both penalties."""
        out = self.inner.loss(run, batch)
        weight = annealed(run, self.weight, self.jump, before=0.0)
        invariance = annealed(run, self.irm_weight, self.irm_jump)
        out.terms["ibirm"] = weight * iberm.penalty(
            batch.by_domain(out.features)
        ) + invariance * irm.penalty(out.logits, out.batch)
        return out

    def after_step(self, run: Run) -> None:
        """Reset the optimizer where a weight jumps."""
        reset_at(run, self.jump)
        reset_at(run, self.irm_jump)
