"""CDANN: within each class, a discriminator shall not be able to tell the domains."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dgavg.batch import Batch, Loss
from dgavg.run import Run
from dgavg.trainer import Trainer, fixed, trainer
from dgavg.trainers.model.discriminator import adversary, check, make, reverse, take_turns


@trainer("cdann", min_domains=2)
class CDANN(Trainer):
    """CDANN: a domain discriminator that knows the class (Li et al. 2018, ECCV).

    As `dann`, but the discriminator reads the features plus a learned vector of each row's class,
    and every class counts the same: a row weighs 1 / (rows of its class in the batch · classes).
    This is DomainBed's form; the paper has a discriminator for each class. DomainBed counts the
    classes up to the largest label in the batch, here all of them count. A row whose label is
    mixed has the mixture of the vectors and of the weights. What is said of DomainBed's optimizers
    at `dann` holds here too.

    - `weight` (1; usual 0.01 to 100): how much the featurizer works against the discriminator.
    - `grad_penalty` (0; usual 0.1 to 10): times the mean squared slope of the discriminator's loss
      (every row counting the same) in what it reads.
    - `d_steps` (0; DomainBed 1, usual 1 to 8): above 0, that many steps train the discriminator
      alone, then one step all else.
    - `lr_factor` (1): the discriminator's learning rate, as a multiple of the run's.

    Cost: no pass of the model; a small network beside it. Else as `dann`.

    Avoid: batches in which most classes have a row or two a domain, for then the discriminator
    learns rows by heart.
    """

    weight: float = 1.0
    grad_penalty: float = 0.0
    d_steps: int = fixed(0)
    lr_factor: float = fixed(1.0)

    def validate(self) -> None:
        """Refuse settings out of range."""
        check("cdann", self.weight, self.grad_penalty, self.d_steps, self.lr_factor)

    def module(self, run: Run) -> nn.Module:
        """The discriminator and the vectors of the classes."""
        return make(run, "cdann", conditional=True)

    def setup(self, run: Run) -> None:
        """Set its learning rate and who rests when."""
        run.scale_lr("cdann", self.lr_factor)
        take_turns(self, run, self.d_steps)

    def loss(self, run: Run, batch: Batch) -> Loss:
        """Add the discriminator's loss, turned round for the features."""
        out = self.inner.loss(run, batch)
        features = reverse(out.features, self.weight)
        y = out.batch.y
        labels = (y if y.is_floating_point() else F.one_hot(y, run.classes)).to(features.dtype)
        net, penalty = run.extras["cdann"], self.grad_penalty
        out.terms["cdann"] = adversary(net, features, out.batch, penalty, labels, balanced(labels))
        return out


def balanced(labels: Tensor) -> Tensor:
    """The weights (N,) of rows with labels (N, classes): each class in the batch has the same."""
    counts = labels.sum(dim=0)
    return (labels / counts.clamp_min(1e-12)).sum(dim=1) / labels.shape[1]
