"""ReplicaScorer: every candidate of several runs, one run after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from dgavg.data.stacked import Pool
from dgavg.evaluation.scoring import Found, Scorer
from dgavg.evaluation.split import Split
from dgavg.models.stack import part
from dgavg.trainer import Candidate, Weights


class ReplicaScorer:
    """Scores candidates of a `Stack`, each model of it by a `Scorer` of its own.

    Batches to score are large, so to score several models in one pass would save few calls, and
    take the memory of all.
    """

    def __init__(self, scorers: Sequence[Scorer]) -> None:
        self.scorers = list(scorers)

    def score(self, candidates: Mapping[str, Candidate]) -> list[dict[str, Found]]:
        """Of each model, scores by candidate and split."""
        return [
            scorer.score({k: replace(c, weights=part(c.weights, r)) for k, c in candidates.items()})
            for r, scorer in enumerate(self.scorers)
        ]

    def weights(self, name: str, r: int) -> Weights:
        """A copy of the weights that `name` of model `r` was last scored with."""
        return {k: v.detach().clone() for k, v in self.scorers[r].weights(name).items()}


class PoolSplit(Split):
    """Rows (n,) of the images that all models share."""

    def __init__(self, pool: Pool, rows: Tensor) -> None:
        super().__init__(pool.kept, pool.labels[rows.to(pool.labels.device)])
        self.rows = rows.to(pool.labels.device) if self.resident else rows

    def gather(self, rows: slice | Tensor) -> Tensor:
        """Some images, on the device if they are held there; any thread may call it."""
        return super().gather(self.rows[rows])
