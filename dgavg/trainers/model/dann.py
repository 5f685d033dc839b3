"""DANN: a discriminator shall not be able to tell the domains by their features."""

from __future__ import annotations

from torch import nn

from dgavg.batch import Batch, Loss
from dgavg.run import Run
from dgavg.trainer import Trainer, fixed, trainer
from dgavg.trainers.model.discriminator import adversary, check, make, reverse, take_turns


@trainer("dann", min_domains=2)
class DANN(Trainer):
    """DANN: features that hide their domain (Ganin et al. 2016, arXiv 1505.07818).

    A network reads the features and learns the domain by cross-entropy; the featurizer gets −weight
    times its gradient, in the same pass, by a layer that turns the gradient round (the paper). The
    discriminator (two hidden layers of 256, as in DomainBed) learns at its own full gradient
    whatever `weight` is. The term that is logged is its loss. DomainBed alternates instead, see
    `d_steps`, with an Adam for each side (beta1 0.5, beta2 0.9, rates and weight decays of their
    own); here both sides share the run's optimizer, its betas and its weight decay.

    - `weight` (1; usual 0.01 to 100): how much the featurizer works against the discriminator. The
      paper raises it from 0: `{warmup_exponential: {to: 1}}`.
    - `grad_penalty` (0; usual 0.1 to 10): times the mean squared slope of the discriminator's loss
      in each row's features.
    - `d_steps` (0; DomainBed 1, usual 1 to 8): above 0, that many steps train the discriminator
      alone, then one step all else. Who rests keeps weights and moments; batch norm sees every
      step. DomainBed counts from another step of the cycle.
    - `lr_factor` (1): the discriminator's learning rate, as a multiple of the run's.

    Cost: no pass of the model; a small network beside it. With `d_steps` n, 1 step in n + 1 trains
    the model, at full cost each. With a penalty one more backward pass of the discriminator.

    Avoid: domains whose classes are unevenly spread, for then equal features mean wrong ones; and
    large weights from the first step, which leave the features nothing to learn from.
    """

    weight: float = 1.0
    grad_penalty: float = 0.0
    d_steps: int = fixed(0)
    lr_factor: float = fixed(1.0)

    def validate(self) -> None:
        """Refuse settings out of range."""
        check("dann", self.weight, self.grad_penalty, self.d_steps, self.lr_factor)

    def module(self, run: Run) -> nn.Module:
        """The discriminator."""
        return make(run, "dann", conditional=False)

    def setup(self, run: Run) -> None:
        """Set its learning rate and who rests when."""
        run.scale_lr("dann", self.lr_factor)
        take_turns(self, run, self.d_steps)

    def loss(self, run: Run, batch: Batch) -> Loss:
        """Add the discriminator's loss, turned round for the features."""
        out = self.inner.loss(run, batch)
        features = reverse(out.features, self.weight)
        out.terms["dann"] = adversary(run.extras["dann"], features, out.batch, self.grad_penalty)
        return out
