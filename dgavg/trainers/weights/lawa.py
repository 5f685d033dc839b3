"""LAWA: the mean of the weights at the ends of the latest epochs."""

from __future__ import annotations

from dgavg.averaging import LatestMean
from dgavg.errors import require
from dgavg.run import Run
from dgavg.trainer import Candidate, Trainer, fixed, state, trainer
from dgavg.trainers.weights.shadow import by_epoch, check_shadow, offer


@trainer("lawa", stackable=True)
class LAWA(Trainer):
    """Latest weight averaging: mean of the last `k` epoch ends (Kaddour 2022, arXiv 2209.14981).

    A shadow: training is untouched, bit for bit. Offers `lawa`, the mean of as many as there are
    while those are fewer than `k`.

    - `k` (6; usual 3 to 20): epoch ends that it remembers.
    - `start` (0): a share of the run, or from 1 on a step; epochs that end from there on count.
    - `every` (1): epochs between two that count.
    - `batchnorm` (`average`, since epoch ends so near each other have statistics alike): `keep`,
      `average` or `recalibrate`.

    Cost: `k` copies of the weights, copied once an epoch. Pays while weights still move on, where a
    mean from a fixed start on drags the first ones along.

    Avoid: at a plateau, where `swa` averages more for one copy.
    """

    k: int = fixed(6)
    start: float = fixed(0)
    every: int = fixed(1)
    batchnorm: str = "average"
    average: LatestMean = state()

    def validate(self) -> None:
        """Refuse settings out of range."""
        require(self.k >= 1, f"trainer.lawa.k={self.k}: a number of epochs from 1 on")
        check_shadow(self)

    def setup(self, run: Run) -> None:
        """Make room for the latest weights."""
        self.average = LatestMean(run.live, k=self.k, **by_epoch(self, run))

    def after_epoch(self, run: Run) -> None:
        """Take in the weights."""
        self.average.update(run.live)

    def candidates(self) -> dict[str, Candidate]:
        """The average."""
        return offer(self, self.average)
