"""Post-hoc EMA: averages of any length, chosen after training."""

from __future__ import annotations

from dgavg.averaging.posthoc import MISFIT, PostHocMean, fit, power_of
from dgavg.errors import UserError, require
from dgavg.run import Run
from dgavg.trainer import Candidate, Trainer, fixed, state, trainer
from dgavg.trainers.weights.shadow import by_step, check_shadow


@trainer("posthocema", stackable=True)
class PostHocEMA(Trainer):
    """Power-function EMAs of any length from few snapshots (Karras et al. 2024, arXiv 2312.02696).

    A shadow: training is untouched, bit for bit. Offers a candidate for each length in `offer`,
    named by it in percent: `posthocema5`, `posthocema10`, `posthocema20`. A length is the standard
    deviation of the weights in time as a share of the run so far, so unlike a decay it needs no
    change when the run is longer. After `fit`, `average.weights(length, at)` gives other lengths,
    at snapshots and between them where the fit is good.

    - `offer` ([0.05, 0.1, 0.2]; up to 0.2887, the uniform mean): lengths to score.
    - `lengths` ([0.05, 0.1], the authors'): averages kept while training.
    - `snapshots` (8): at most how often in the run they are stored; more fit other lengths better
      (along a random walk 8 miss the average of length 0.2 by 3 % of its distance to the last
      weights, 16 by 0.6 %).
    - `start` (0), `every` (1): as those of `ema`.
    - `batchnorm` (`average`): `keep`, `average` or `recalibrate`.

    Cost: one pass over the weights a step for each of `lengths`; a copy of the weights in float32
    for each of them and each snapshot of each, so 18 copies by default.

    Avoid: where one length is known: `ema` keeps it for one copy.
    """

    offer: tuple[float, ...] = (0.05, 0.1, 0.2)
    lengths: tuple[float, ...] = (0.05, 0.1)
    snapshots: int = fixed(8)
    start: float = fixed(0)
    every: int = fixed(1)
    batchnorm: str = "average"
    average: PostHocMean = state()

    def validate(self) -> None:
        """Refuse settings out of range."""
        check_shadow(self)
        require(self.snapshots >= 1, f"trainer.posthocema.snapshots={self.snapshots}: at least 1")
        for key in ("offer", "lengths"):
            values = list(getattr(self, key))
            require(
                bool(values) and len(set(values)) == len(values),
                f"trainer.posthocema.{key}={values}: at least one length, all different",
            )
            for value in values:
                try:
                    power_of(value)
                except ValueError as error:
                    raise UserError(f"trainer.posthocema.{key}={values}: {error}") from None
        names = self.candidate_names()
        require(
            len(set(names)) == len(names),
            f"trainer.posthocema.offer={list(self.offer)}: two of them are both "
            f"{max(names, key=names.count)}, named by six digits",
        )

    def setup(self, run: Run) -> None:
        """Make room for the averages."""
        options = by_step(self, run)
        updates = max(-(-(run.steps - options["start"]) // self.every), 1)
        every = -(-updates // self.snapshots)
        self.average = PostHocMean(run.live, lengths=self.lengths, snapshot_every=every, **options)
        self._require_fits(sorted({*range(every, updates + 1, every), updates}))

    def _require_fits(self, counts: list[int]) -> None:
        """Raise `UserError` for a length that the snapshots of the whole run can't make."""
        profiles = [(n, power_of(length)) for n in counts for length in self.lengths]
        for length in self.offer:
            _, missed = fit(profiles, (counts[-1], power_of(length)))
            require(
                missed <= MISFIT,
                f"trainer.posthocema.offer={list(self.offer)}: {length} can't be made of lengths="
                f"{list(self.lengths)} with snapshots={self.snapshots} (they miss {missed:.0%} of "
                "it): more snapshots, or a length nearer to it",
            )

    def after_step(self, run: Run) -> None:
        """Take in the iterate."""
        self.average.update(run.live)

    def candidate_names(self) -> list[str]:
        """One for each length, in percent."""
        return [f"posthocema{100 * length:g}" for length in self.offer]

    def candidates(self) -> dict[str, Candidate]:
        """An average of each length, as soon as the snapshots can make it."""
        if self.average is None or self.average.count == 0:
            return {}
        names = dict(zip(self.candidate_names(), self.offer, strict=True))
        made = {k: length for k, length in names.items() if self.average.can_make(length)}
        weights = self.average.weights_of(list(made.values()))
        return {k: Candidate(w, self.batchnorm) for k, w in zip(made, weights, strict=True)}
