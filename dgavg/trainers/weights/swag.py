"""SWAG: a Gaussian about the mean of the weights at the ends of epochs."""

from __future__ import annotations

import math

import torch

from dgavg.averaging.gaussian import GaussianPosterior
from dgavg.errors import require
from dgavg.run import Run
from dgavg.trainer import Candidate, Trainer, fixed, state, trainer
from dgavg.trainers.weights.shadow import by_epoch, check_shadow, epochs_that_count, offer


@trainer("swag")
class SWAG(Trainer):
    """SWA-Gaussian: SWA's mean, a Gaussian to sample (Maddox et al. 2019, arXiv 1902.02476).

    A shadow: training is untouched, bit for bit. Offers `swag`, the mean, which is that of `swa`,
    and with `samples` after the last step `swag_bma`, the mean prediction of weights drawn from the
    Gaussian. In Python `posterior` has its variances, `sample` and `predict`.

    - `start` (0.5; the paper 160 of 300 epochs): a share of the run, or from 1 on a step; epochs
      that end from there on count.
    - `every` (1): epochs between two that count.
    - `rank` (20): deviations kept for the covariance between weights, as many as epochs count at
      most; 0 for variances alone.
    - `scale` (1): of the covariance of the samples; 1 is the paper's, the authors' code calls it
      0.5.
    - `samples` (0; the paper 30): weights drawn for `swag_bma`.
    - `batchnorm` (`recalibrate`, as the paper, for each sample too): `keep`, `average` or
      `recalibrate`.

    The paper holds the learning rate constant from `start` on; in a chain with `swa`,
    `swa.lr_final` does.

    Cost: 2 + `rank` copies of the weights, in checkpoints too; a pass over the training images an
    evaluation. At the end one evaluation more, and for each sample a copy of the weights and a pass
    over the training images.

    Avoid: large models, unless you want samples: the mean alone is `swa`'s, for one copy.
    """

    start: float = fixed(0.5)
    every: int = fixed(1)
    rank: int = fixed(20)
    scale: float = fixed(1.0)
    samples: int = fixed(0)
    batchnorm: str = "recalibrate"
    posterior: GaussianPosterior = state()
    seed: int | None = state()  # of the samples, once training is over

    def validate(self) -> None:
        """Refuse settings out of range."""
        check_shadow(self)
        require(self.rank >= 0, f"trainer.swag.rank={self.rank}: deviations to keep, from 0 on")
        require(0 <= self.scale < math.inf, f"trainer.swag.scale={self.scale}: a number from 0 on")
        require(self.samples >= 0, f"trainer.swag.samples={self.samples}: a number from 0 on")

    def setup(self, run: Run) -> None:
        """Make room for the moments."""
        options = by_epoch(self, run)
        rank = min(self.rank, epochs_that_count(self, run, options["start"]))  # no empty ones
        self.posterior = GaussianPosterior(run.live, rank=rank, **options)

    def after_epoch(self, run: Run) -> None:
        """Take in the weights."""
        self.posterior.update(run.live)

    def after_fit(self, run: Run) -> None:
        """From here on there are samples, always the same."""
        self.seed = int(run.random("swag").integers(2**63))

    def candidates(self) -> dict[str, Candidate]:
        """The mean; after the last step the samples too."""
        found = offer(self, self.posterior)
        if found and self.samples and self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed)
            members = tuple(
                self.posterior.sample(self.scale, generator=generator) for _ in range(self.samples)
            )
            found["swag_bma"] = Candidate(found["swag"].weights, self.batchnorm, members)
        return found
