"""EMA: an exponential moving average of the iterates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dgavg.averaging import ExponentialMean
from dgavg.averaging.exponential import WARMUPS
from dgavg.errors import UserError, require
from dgavg.run import Run
from dgavg.trainer import Candidate, Trainer, Weights, fixed, state, trainer
from dgavg.trainers.weights.shadow import by_step, check_shadow, offer


@trainer("ema", stackable=True)
class EMA(Trainer):
    """Exponential moving average of the iterates (Tarvainen and Valpola 2017, arXiv 1703.01780).

    a ← decay·a + (1 − decay)·w after every step. A shadow: training is untouched, bit for bit.
    Offers `ema`, which starts at the first iterate.

    - `decay` (0.99; usual 0.99 to 0.9999): it remembers about 1/(1 − decay) updates, which should
      be well below the run's steps, or the first weights never fade: see `warmup`.
    - `half_life` (none): the same said in steps, whatever `every` is; takes the place of `decay`.
    - `warmup` (none): a smaller decay at first, s steps after `start`. `power`:
      1 − (1 + s/gamma)^−power (timm, ema-pytorch), `count`: (1 + s)/(10 + s) (TensorFlow),
      `annealing`: 1 − gamma/(gamma + s) (mmengine), `exponential`: decay·(1 − exp(−s/gamma))
      (ultralytics), `bias_correction`: that of Adam.
    - `gamma` (by warm-up 1, 100, 2000), `power` (2/3), `min_decay` (0): of the warm-up.
    - `start` (0): a step, or below 1 a share of the run.
    - `every` (1): steps between two updates.
    - `batchnorm` (`average`): `keep`, `average` or `recalibrate`.

    Cost: one copy of the weights, one pass over them a step.

    Avoid: a memory as long as the run, without a warm-up: the first weights never fade.
    """

    decay: float = 0.99
    half_life: float | None = fixed(None)
    warmup: str | None = None
    gamma: float | None = fixed(None)
    power: float = fixed(2 / 3)
    min_decay: float = fixed(0.0)
    start: float = fixed(0)
    every: int = fixed(1)
    batchnorm: str = "average"
    average: ExponentialMean = state()

    def validate(self) -> None:
        """Refuse settings out of range."""
        require(0 <= self.decay < 1, f"trainer.ema.decay={self.decay}: a number in [0, 1)")
        known = (*WARMUPS, "bias_correction")
        require(
            self.warmup is None or self.warmup in known,
            f"trainer.ema.warmup={self.warmup}: choose one of null, {', '.join(known)}",
        )
        require(
            "decay" not in self.scheduled or self.warmup is None is self.half_life,
            "trainer.ema.decay follows a schedule: leave out half_life and warmup",
        )
        check_shadow(self)
        try:
            self._average({"w": torch.zeros(1)}, {"interval": self.every})
        except ValueError as error:
            raise UserError(f"trainer.ema.{error}") from None

    def setup(self, run: Run) -> None:
        """Make room for the average."""
        self.average = self._average(run.live, by_step(self, run))

    def _average(self, live: Weights, options: Mapping[str, Any]) -> ExponentialMean:
        corrected = self.warmup == "bias_correction"
        return ExponentialMean(
            live,
            decay=self.decay if self.half_life is None else None,
            half_life=self.half_life,
            bias_correction=corrected,
            warmup=None if corrected else self.warmup,
            gamma=self.gamma,
            power=self.power,
            min_decay=self.min_decay,
            **options,
        )

    def after_step(self, run: Run) -> None:
        """Take in the iterate."""
        if "decay" in self.scheduled:
            self.average.decay = self.decay
        self.average.update(run.live)

    def candidates(self) -> dict[str, Candidate]:
        """The average."""
        return offer(self, self.average)
