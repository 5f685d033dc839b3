"""EMA: an exponential moving average of the iterates."""

from __future__ import annotations

from dgavg.averaging import ExponentialMean
from dgavg.errors import require
from dgavg.run import Run
from dgavg.trainer import Candidate, Trainer, state, trainer
from dgavg.trainers.weights.shadow import buffers_for, check_shadow, offer


@trainer("ema")
class EMA(Trainer):
    """Exponential moving average, a ← decay·a + (1 − decay)·w (Tarvainen and Valpola 2017).

    arXiv 1703.01780. A shadow: training is untouched, bit for bit. Offers `ema`, which starts at
    the first iterate.

    - `decay` (0.99; usual 0.99 to 0.9999): it remembers about 1/(1 − decay) updates, which should
      be well below the run's steps, or the first weights never fade.
    - `start` (0): a step, or below 1 a share of the run.
    - `every` (1): steps between two updates.
    - `batchnorm` (`average`): `keep`, `average` or `recalibrate`.

    Cost: one copy of the weights in float32, one pass over them a step.
    """

    decay: float = 0.99
    start: float = 0
    every: int = 1
    batchnorm: str = "average"
    average: ExponentialMean | None = state()
    first: int = state(int)

    def validate(self) -> None:
        """Refuse settings out of range."""
        require(0 <= self.decay < 1, f"trainer.ema.decay={self.decay}: a number in [0, 1)")
        check_shadow("ema", self.start, self.every, self.batchnorm)

    def setup(self, run: Run) -> None:
        """Make room for the average."""
        self.first = max(run.step_of(self.start, "trainer.ema.start"), 1)
        self.average = ExponentialMean(
            run.live,
            decay=self.decay,
            buffers=buffers_for(self.batchnorm),
            buffer_names=run.buffer_names,
        )

    def after_step(self, run: Run) -> None:
        """Take in the iterate."""
        if run.t >= self.first and (run.t - self.first) % self.every == 0:
            assert self.average is not None
            self.average.update(run.live)

    def candidates(self) -> dict[str, Candidate]:
        """The average."""
        return offer("ema", self.average, self.batchnorm)
