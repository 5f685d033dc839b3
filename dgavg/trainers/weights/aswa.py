"""ASWA: an average that takes in the live weights where validation data speak for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dgavg.averaging.validated import ValidatedMean
from dgavg.errors import require
from dgavg.run import Run
from dgavg.trainer import Candidate, Scores, Trainer, Weights, fixed, state, trainer
from dgavg.trainers.weights.shadow import buffers_of, check_shadow, offer


@dataclass(slots=True)
class Lookahead:
    """The average with the live weights of now taken in; it has no state of its own."""

    average: ValidatedMean
    live: Weights

    def weights(self) -> Weights:
        """By name, in borrowed memory."""
        return self.average.lookahead(self.live)

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Nothing."""


@trainer("aswa")
class ASWA(Trainer):
    """Adaptive stochastic weight averaging (Demir et al. 2024, arXiv 2406.19092).

    A shadow: training is untouched, bit for bit. Offers `aswa`. Each evaluation also scores the
    lookahead, the average with the live weights taken in, and compares: where the live weights beat
    both, the average starts again from them (hard); else, where the lookahead beats the average, it
    becomes the average (soft); else nothing changes. Ties and NaN change nothing. All three are
    scored at the same evaluation, on the validation parts of the training domains; the candidates
    are scored once more after the last step, so that the last decision is seen.

    - `metric` (`accuracy`): what is compared, `accuracy` or `loss`.
    - `lower` (none): whether lower is better; by default for `loss` alone.
    - `hard` (true): false never starts again, as the authors' own code.
    - `start` (0): a step, or below 1 a share of the run.
    - `every` (1): evaluations between two that count.
    - `batchnorm` (`recalibrate`, as the authors): `keep`, `average` or `recalibrate`.

    Cost: two copies of the weights; two candidates to score and a pass over the training images an
    evaluation.

    Avoid: with a small validation part. It selects on validation data again and again, and an
    accuracy that is best there by chance is kept for good.
    """

    metric: str = "accuracy"
    lower: bool | None = None
    hard: bool = True
    start: float = fixed(0)
    every: int = fixed(1)
    batchnorm: str = "recalibrate"
    average: ValidatedMean = state()
    ahead: Lookahead = state()
    first: int = state(int)
    seen: int = state(int)
    done: bool = state(bool)

    def validate(self) -> None:
        """Refuse settings out of range."""
        require(bool(self.metric), "trainer.aswa.metric='': such as accuracy or loss")
        check_shadow(self)

    def setup(self, run: Run) -> None:
        """Make room for the average; refuse a run without evaluations."""
        require(
            run.evaluate is not None,
            "aswa compares candidates on validation data: give the run evaluate=...",
        )
        self.first = run.step_of(self.start, "trainer.aswa.start")
        lower = self.metric == "loss" if self.lower is None else self.lower
        options = buffers_of(self, run)
        self.average = ValidatedMean(run.live, hard=self.hard, lower=lower, **options)
        self.ahead = Lookahead(self.average, run.live)

    def after_eval(self, run: Run, scores: Scores) -> None:
        """Decide, by the scores of this evaluation."""
        if run.t < self.first or self.done:
            return
        if self.seen % self.every == 0:
            names = {"live": "live"}
            if self.average.count > 0:
                names |= {"average": "aswa", "lookahead": "aswa_lookahead"}
            metrics = {key: self._metric(scores, name) for key, name in names.items()}
            self.average.decide(run.live, **metrics)
        self.seen += 1

    def _metric(self, scores: Scores, name: str) -> float:
        require(name in scores, f"aswa compares {name!r}, but evaluate(run) gave no score for it")
        known = ", ".join(scores[name])
        require(
            self.metric in scores[name],
            f"trainer.aswa.metric={self.metric}: evaluate(run) gives {known or 'nothing'}",
        )
        return scores[name][self.metric]

    def after_fit(self, run: Run) -> None:
        """The last decision is made; the candidates are scored again to see what it was."""
        self.done = True

    def candidates(self) -> dict[str, Candidate]:
        """The average, and what it would be."""
        found = offer(self, self.average)
        if found and not self.done and self.seen % self.every == 0:
            weights = self.ahead.weights()
            found["aswa_lookahead"] = Candidate(weights, self.batchnorm, probe=True)
        return found
