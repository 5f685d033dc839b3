"""TWA: an average of the ends of epochs whose coefficients are trained."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dgavg.averaging.subspace import WeightSubspace
from dgavg.averaging.subspace_sgd import SubspaceSGD
from dgavg.errors import require
from dgavg.run import Run
from dgavg.seeding import random_state, set_random_state
from dgavg.trainer import Candidate, Trainer, fixed, state, trainer
from dgavg.trainers.weights.shadow import by_epoch, check_shadow, offer


@trainer("twa")
class TWA(Trainer):
    """Trainable weight averaging (Li et al. 2023, arXiv 2205.13104).

    Keeps the weights at the ends of the last epochs, and after the last step trains the
    coefficients of their average: SGD on the training loss, penalties of the chain included, with
    the gradient at the average and each step projected on the span of the samples. A shadow: when
    that phase is over everything else is as before, bit for bit. Offers `twa`, before it the mean.

    - `start` (0.5): a share of the run, or from 1 on a step; epochs that end from there on count.
    - `every` (1): epochs between two that count.
    - `samples` (10): how many of the last that count are kept.
    - `steps` (0.05): of the phase, as a share of the run or from 1 on a number; they train on the
      batches that the run would have come to next.
    - `learning_rate` (0.03), `momentum` (0.9), `weight_decay` (0): of SGD on the weights within the
      span.
    - `reg` (0): draws towards the mean of the samples.
    - `centred` (true): move in the plane through the samples, where coefficients sum to 1; false is
      the span through the origin.
    - `batchnorm` (`recalibrate`, as the paper): `keep`, `average` or `recalibrate`.

    `centred=false` with momentum and weight decay is the authors' rule; `momentum=0` with `reg` is
    dicee's. `coefficients` holds the result, oldest sample first.

    Cost: `samples` copies of the weights, in checkpoints too; for the phase 2 more, and `steps` of
    training, in each of which the samples are read twice; a pass over the training images an
    evaluation. Pays where the mean lags behind, as from an early start or in a run cut short: there
    it beats the mean by points.

    Avoid: a training loss near 0, where no coefficients are better than the mean's.
    """

    start: float = fixed(0.5)
    every: int = fixed(1)
    samples: int = fixed(10)
    steps: float = fixed(0.05)
    learning_rate: float = fixed(0.03)
    momentum: float = fixed(0.9)
    weight_decay: float = fixed(0.0)
    reg: float = fixed(0.0)
    centred: bool = True
    batchnorm: str = "recalibrate"
    average: WeightSubspace = state()
    coefficients: list[float] = state(list)

    def validate(self) -> None:
        """Refuse settings out of range."""
        check_shadow(self)
        require(self.samples >= 2, f"trainer.twa.samples={self.samples}: at least 2")
        whole = self.steps < 1 or self.steps.is_integer()
        require(
            0 <= self.steps < math.inf and whole,
            f"trainer.twa.steps={self.steps:g}: a share of the run below 1, or a number from 1 on",
        )
        require(
            0 < self.learning_rate < math.inf,
            f"trainer.twa.learning_rate={self.learning_rate:g}: a number above 0",
        )
        require(
            0 <= self.momentum < 1, f"trainer.twa.momentum={self.momentum:g}: a number in [0, 1)"
        )
        for name, value in (("weight_decay", self.weight_decay), ("reg", self.reg)):
            require(0 <= value < math.inf, f"trainer.twa.{name}={value:g}: a number from 0 on")

    def setup(self, run: Run) -> None:
        """Make room for the samples."""
        options = by_epoch(self, run, fewest=2)
        self.average = WeightSubspace(run.live, k=self.samples, centred=self.centred, **options)

    def after_epoch(self, run: Run) -> None:
        """Take in the weights."""
        self.average.update(run.live)

    def after_fit(self, run: Run) -> None:
        """Train the coefficients."""
        n = self.average.samples
        if n < 2:  # stopped early
            return
        share = max(round(self.steps * run.steps), 1) if self.steps else 0
        steps = share if self.steps < 1 else int(self.steps)
        mean = self.average.coefficients = [1.0 / n] * n
        try:
            with untouched(run):
                blown = self._train(run, range(run.steps, run.steps + steps))
        except BaseException:
            self.average.coefficients = mean
            raise
        if blown is not None:  # the other candidates of the run are as good as ever
            self.average.coefficients = mean
            warnings.warn(
                f"twa: the coefficients blew up in step {blown} of their training, so twa is the "
                "mean of its samples: lower trainer.twa.learning_rate",
                stacklevel=2,
            )
        self.coefficients = self.average.coefficients.tolist()

    def _train(self, run: Run, times: range) -> int | None:
        """Train them over the batches of `times`; gives the step in which they blew up, if any."""
        sgd = SubspaceSGD(
            self.average,
            lr=self.learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            reg=self.reg,
        )
        for t in times:
            run.t = t
            self.average.copy_to(run.live)
            run.grad(run.prepare(run.batches(t)))
            sgd.step(run.model)
            if not self.average.coefficients.isfinite().all():
                return t - times.start
        return None

    def candidates(self) -> dict[str, Candidate]:
        """The average."""
        return offer(self, self.average)


@contextmanager
def untouched(run: Run) -> Iterator[None]:
    """After this block, or any exception in it, the run is as before: a phase of a link's own.

    Weights, buffers, gradients, modes, the optimizer's state, the clock, the random generators; in
    the block gradients start from none.
    """
    modules = [m for part in (run.model, run.extras) for m in part.modules()]
    modes = [m.training for m in modules]
    parameters = [*run.model.parameters(), *run.extras.parameters()]
    tensors = [*parameters, *run.model.buffers(), *run.extras.buffers()]
    before = [t.detach().clone() for t in tensors]
    gradients = [p.grad for p in parameters]
    moments = {p: dict(found) for p, found in run.optimizer.state.items()}
    t, draws = run.t, random_state(run.device)
    for p in parameters:
        p.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(tensors, before)
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        for m, mode in zip(modules, modes, strict=True):
            m.training = mode
        run.optimizer.state.clear()
        run.optimizer.state.update(moments)
        run.t = t
        set_random_state(draws, run.device)
