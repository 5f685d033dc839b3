"""SWAD: the mean of every iterate in the valley of the validation loss."""

from __future__ import annotations

import math

from dgavg.averaging.valley import LossValley
from dgavg.averaging.valley_rules import RULES
from dgavg.errors import require
from dgavg.run import Run
from dgavg.trainer import Candidate, Scores, Trainer, fixed, state, trainer
from dgavg.trainers.weights.shadow import by_step, check_shadow, offer


@trainer("swad")
class SWAD(Trainer):
    """Stochastic weight averaging, densely, in the loss valley (Cha et al. 2021, arXiv 2102.08604).

    A shadow unless `stop` is set: training is untouched, bit for bit. Offers `swad`: the mean of
    the iterates from where the validation loss of the live weights (the mean over the training
    domains) is lowest to where it has risen. Until that loss has turned, the mean of the iterates
    since the last evaluation. An evaluation scores what the losses before it say, so the candidates
    are scored once more after the last step, when its loss is known.

    - `n_converge` (3): the valley begins at a loss that this many evaluations don't undercut,
      itself included.
    - `n_tolerance` (6): it has ended before this many losses in a row above the tolerance.
    - `tolerance_ratio` (0.3; the authors take 0.2 for VLCS): how far above, as a share.
    - `rule` (`paper`): `paper` averages every iterate from the lowest loss on, and the tolerance is
      relative to that loss. `code` is the authors' code: the mean of segments between evaluations,
      some of which count twice, relative to the mean of the first `n_converge` losses. It also
      evaluates after the first step; without that, the segments counted twice can be others where
      the valley begins within the first n_tolerance − n_converge evaluations.
    - `stop` (false): end the run with the valley; else the average stays and training goes on.
    - `start` (0): a step, or below 1 a share of the run; `every` (1): steps between two iterates
      that count.
    - `batchnorm` (`recalibrate`): `keep`, `average` or `recalibrate`; frozen layers stay.

    Cost: one pass over the weights a step, 3 copies of them. With `rule=code` as many copies as the
    larger of `n_tolerance` and `n_converge`; a pass over the training images an evaluation.

    Avoid: with fewer than 10 evaluations, since a valley is as fine as they are. Where the loss
    falls to the end there is no valley, and `sma` or `ema` average more.
    """

    n_converge: int = fixed(3)
    n_tolerance: int = fixed(6)
    tolerance_ratio: float = fixed(0.3)
    rule: str = "paper"
    stop: bool = False
    start: float = fixed(0)
    every: int = fixed(1)
    batchnorm: str = "recalibrate"
    average: LossValley = state()

    def validate(self) -> None:
        """Refuse settings out of range."""
        for key in ("n_converge", "n_tolerance"):
            value = getattr(self, key)
            require(value >= 1, f"trainer.swad.{key}={value}: a number of evaluations from 1 on")
        require(
            0 <= self.tolerance_ratio < math.inf,
            f"trainer.swad.tolerance_ratio={self.tolerance_ratio}: a share of the loss from 0 on",
        )
        require(
            self.rule in RULES, f"trainer.swad.rule={self.rule}: choose one of {', '.join(RULES)}"
        )
        check_shadow(self)

    def setup(self, run: Run) -> None:
        """Make room for the first sum; refuse a run with too few evaluations to find a valley."""
        options = by_step(self, run)
        require(
            run.evaluate is not None,
            "swad looks for a valley of the validation loss: give the run evaluate=...",
        )
        count = sum(run.evaluates_at(t) for t in range(options["start"] + 1, run.steps + 1))
        require(
            count >= self.n_converge,
            f"swad needs {self.n_converge} evaluations to find a valley, but here are {count}: "
            "evaluate more often, train longer, or lower trainer.swad.n_converge",
        )
        self.average = LossValley(
            run.live,
            n_converge=self.n_converge,
            n_tolerance=self.n_tolerance,
            tolerance_ratio=self.tolerance_ratio,
            rule=self.rule,
            **options,
        )

    def after_step(self, run: Run) -> None:
        """Take in the iterate."""
        self.average.update(run.live)

    def may_end(self) -> bool:
        """Where it stops at the end of the valley."""
        return self.stop

    def after_eval(self, run: Run, scores: Scores) -> None:
        """Read the loss of the live weights."""
        self.average.evaluated(run.live, scores["live"]["loss"])
        if self.stop and self.average.ended and not run.stop:
            run.stop = "the valley of 'swad' has ended"

    def after_fit(self, run: Run) -> None:
        """Nothing, but it has the candidates scored again: now the last loss counts, too."""

    def candidates(self) -> dict[str, Candidate]:
        """The average that the losses so far make."""
        return offer(self, self.average)
