"""SWA: the mean of the weights at the ends of epochs."""

from __future__ import annotations

from dgavg.averaging import RunningMean, swa_lr
from dgavg.errors import require
from dgavg.run import Run
from dgavg.trainer import Candidate, Trainer, state, trainer
from dgavg.trainers.weights.shadow import buffers_for, check_shadow, offer


@trainer("swa")
class SWA(Trainer):
    """Stochastic weight averaging at the ends of epochs (Izmailov et al. 2018, arXiv 1803.05407).

    A shadow unless `lr_final` is set: training is untouched, bit for bit. Offers `swa`.

    - `start` (0.5; the paper 0.75): a share of the run, or from 1 on a step; epochs that end from
      there on count.
    - `every` (1): epochs between two that count.
    - `lr_final` (none): ease the learning rate to this constant on the way to `start`, from half of
      it on, and keep it; the paper uses 1/2 to 1/10 of the initial one.
    - `batchnorm` (`recalibrate`, as the paper): `keep`, `average` or `recalibrate`.

    Cost: one copy of the weights in float32; a pass over the training images an evaluation.
    """

    start: float = 0.5
    every: int = 1
    lr_final: float | None = None
    batchnorm: str = "recalibrate"
    average: RunningMean | None = state()
    first: int = state(int)
    epochs: int = state(int)

    def validate(self) -> None:
        """Refuse settings out of range."""
        check_shadow("swa", self.start, self.every, self.batchnorm)
        require(
            self.lr_final is None or self.lr_final > 0,
            f"trainer.swa.lr_final={self.lr_final}: a learning rate above 0",
        )

    def setup(self, run: Run) -> None:
        """Make room for the average."""
        self.first = run.step_of(self.start, "trainer.swa.start")
        last = run.steps - run.steps % run.epoch_length
        require(
            last > 0 and last >= self.first,
            f"swa averages at the ends of epochs, but none of {run.epoch_length} steps ends from "
            f"step {self.first} to {run.steps}: train longer, lower trainer.swa.start, or use sma",
        )
        self.average = RunningMean(
            run.live, buffers=buffers_for(self.batchnorm), buffer_names=run.buffer_names
        )

    def lr(self, run: Run) -> float:
        """The inner learning rate, eased to `lr_final` where that is set."""
        initial = self.inner.lr(run)
        if self.lr_final is None:
            return initial
        return swa_lr(run.t, self.first, initial, self.lr_final)

    def after_epoch(self, run: Run) -> None:
        """Take in the weights."""
        if run.t >= self.first:
            if self.epochs % self.every == 0:
                assert self.average is not None
                self.average.update(run.live)
            self.epochs += 1

    def candidates(self) -> dict[str, Candidate]:
        """The average."""
        return offer("swa", self.average, self.batchnorm)
