"""SMA: the mean of every iterate from a start on."""

from __future__ import annotations

from dgavg.averaging import RunningMean
from dgavg.run import Run
from dgavg.trainer import Candidate, Trainer, fixed, state, trainer
from dgavg.trainers.weights.shadow import by_step, check_shadow, offer


@trainer("sma", stackable=True)
class SMA(Trainer):
    """Simple moving average of all iterates from `start` on (Arpit et al. 2022, arXiv 2110.10832).

    A shadow: training is untouched, bit for bit. Offers `sma`.

    - `start` (100, the paper's): a step, or below 1 a share of the run. The authors' code also
      counts the iterate before it.
    - `every` (1): steps between two iterates that count.
    - `batchnorm` (`average`, as the paper): `keep`, `average` or `recalibrate`.

    Cost: one copy of the weights, one pass over them a step. Pays once training moves around a
    plateau.

    Avoid: an early start in a run that still improves at its end: it drags the first steps along.
    """

    start: float = fixed(100)
    every: int = fixed(1)
    batchnorm: str = "average"
    average: RunningMean = state()

    def validate(self) -> None:
        """Refuse settings out of range."""
        check_shadow(self)

    def setup(self, run: Run) -> None:
        """Make room for the average."""
        self.average = RunningMean(run.live, **by_step(self, run))

    def after_step(self, run: Run) -> None:
        """Take in the iterate."""
        self.average.update(run.live)

    def candidates(self) -> dict[str, Candidate]:
        """The average."""
        return offer(self, self.average)
