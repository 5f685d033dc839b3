"""SWA: the mean of the weights at the ends of epochs."""

from __future__ import annotations

import math

from dgavg.averaging import RunningMean
from dgavg.averaging.schedules import annealed_lr, cyclic_lr, fge_lr, swa_lr
from dgavg.errors import require
from dgavg.run import Run
from dgavg.trainer import Candidate, Trainer, fixed, state, trainer
from dgavg.trainers.weights.shadow import by_epoch, check_shadow, offer

SCHEDULES = ("constant", "late", "linear", "cosine", "cyclic", "triangle")


@trainer("swa", stackable=True)
class SWA(Trainer):
    """Stochastic weight averaging at the ends of epochs (Izmailov et al. 2018, arXiv 1803.05407).

    A shadow unless `lr_final` is set: training is untouched, bit for bit. Offers `swa`.

    - `start` (0.5; the paper 0.75): a share of the run, or from 1 on a step; epochs that end from
      there on count.
    - `every` (1): epochs between two that count.
    - `lr_final` (none): the learning rate to average at; the paper uses 1/2 to 1/10 of the initial
      one. How it is reached says `schedule`:
      `constant` eases linearly on the way to `start`, from half of it on, then stays (the paper);
      `late` does so on the way to the end of the run, from `start` on (dicee);
      `linear` and `cosine` ease within `anneal` epochs after `start` (torch's `SWALR`);
      `cyclic` falls from `lr_high` to `lr_final` over every `every` epochs (keras-swa; weights
      count at the low end); `triangle` falls and rises again (FGE, Garipov et al. 2018, 1802.10026;
      weights count half way, at the low end).
    - `lr_high`: where a cycle begins; by default a quarter of the way from `lr_final` to the
      initial rate (cyclic), or the initial rate (triangle).
    - `anneal` (10): epochs.
    - `batchnorm` (`recalibrate`, as the paper): `keep`, `average` or `recalibrate`.

    Cost: one copy of the weights; a pass over the training images an evaluation.

    Avoid: with few epochs left after `start`: `sma` averages every iterate for the same memory.
    """

    start: float = fixed(0.5)
    every: int = fixed(1)
    lr_final: float | None = fixed(None)
    schedule: str = "constant"
    lr_high: float | None = fixed(None)
    anneal: int = fixed(10)
    batchnorm: str = "recalibrate"
    average: RunningMean = state()
    first: int = state(int)
    period: int = state(int)
    cycles_from: int = state(int)

    def validate(self) -> None:
        """Refuse settings out of range."""
        check_shadow(self)
        where = "trainer.swa"
        require(
            self.schedule in SCHEDULES,
            f"{where}.schedule={self.schedule}: choose one of {', '.join(SCHEDULES)}",
        )
        for name, rate in (("lr_final", self.lr_final), ("lr_high", self.lr_high)):
            require(
                rate is None or 0 < rate < math.inf,
                f"{where}.{name}={rate}: a learning rate above 0",
            )
        require(self.anneal >= 1, f"{where}.anneal={self.anneal}: epochs, at least 1")
        cycles = self.schedule in ("cyclic", "triangle")
        require(
            self.lr_final is not None or self.schedule == "constant",
            f"{where}.schedule={self.schedule} leads to a learning rate: set {where}.lr_final",
        )
        require(
            self.lr_high is None or cycles,
            f"{where}.lr_high={self.lr_high}: only schedule=cyclic and triangle have one",
        )
        require(
            self.lr_high is None or self.lr_final is None or self.lr_high >= self.lr_final,
            f"{where}.lr_high={self.lr_high}: at least lr_final, {self.lr_final}",
        )

    def setup(self, run: Run) -> None:
        """Make room for the average; refuse cycles that would rise to their low end."""
        cycles = self.schedule in ("cyclic", "triangle") and self.lr_high is None
        require(
            not cycles or self.lr_final is None or self.lr_final <= run.base_lr,
            f"trainer.swa.lr_final={self.lr_final}: at most the initial rate, {run.base_lr}, "
            "or set trainer.swa.lr_high",
        )
        options = by_epoch(self, run)
        self.first = run.step_of(self.start, "trainer.swa.start")
        self.period = self.every * run.epoch_length
        self.average = RunningMean(run.live, **options)
        end = (options["start"] + 1) * run.epoch_length  # the first epoch end that counts
        self.cycles_from = end - (self.period // 2 if self.schedule == "triangle" else 0)

    def lr(self, run: Run) -> float:
        """The inner learning rate, on its way to `lr_final` where that is set."""
        t, initial, final = run.t, self.inner.lr(run), self.lr_final
        if final is None:
            return initial
        if self.schedule == "cyclic":
            high = self._high(final + 0.25 * (initial - final))
            return cyclic_lr(t, self.cycles_from, self.period, initial, final, high)
        if self.schedule == "triangle":
            before, high = t < self.cycles_from, self._high(initial)
            return initial if before else fge_lr(t, self.cycles_from, self.period, high, final)
        if self.schedule in ("linear", "cosine"):
            length = self.anneal * run.epoch_length
            return annealed_lr(t, self.first, length, initial, final, self.schedule)
        total = run.steps if self.schedule == "late" else None
        return swa_lr(t, self.first, initial, final, total=total)

    def _high(self, default: float) -> float:
        """Where a cycle begins; never below its end, to which a schedule may bring the default."""
        return max(default, self.lr_final or 0.0) if self.lr_high is None else self.lr_high

    def after_epoch(self, run: Run) -> None:
        """Take in the weights."""
        self.average.update(run.live)

    def candidates(self) -> dict[str, Candidate]:
        """The average."""
        return offer(self, self.average)
