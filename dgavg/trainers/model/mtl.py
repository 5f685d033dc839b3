"""MTL: the classifier reads what the features of its domain are like on average, too."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dgavg.batch import Batch, Loss
from dgavg.errors import UserError, require
from dgavg.gather import mean
from dgavg.run import Run
from dgavg.trainer import Trainer, state, trainer
from dgavg.trainers.loss.noted import Noted


@trainer("mtl", min_domains=2)
class MTL(Trainer):
    """MTL: the classifier reads its domain's mean (Blanchard et al. 2021, arXiv 1711.07910).

    The classifier reads [φ, e_d], where e_d = ema · (mean of the features of the domain's rows in
    this batch) + (1 − ema) · (e_d of the step before), which begins at 0; gradients flow through
    the mean. This is DomainBed's form, with the features' mean as the embedding of the domain's
    distribution, but for two lines: its code overwrites e_d with noise (`normal_()`) before the
    classifier reads it, and at evaluation it takes the mean of the test batch at hand. Here the
    mean of the training domains' e_d stands in for that of an unknown domain, so a prediction is a
    function of its image. e_d is part of the model (`classifier.embeddings`): saved, averaged and
    resumed with it. The classifier keeps its weights; those for e_d start at 0, so that the model
    starts as it was.

    - `ema` (0.99; usual 0.5 to 1): the share of this batch's mean in e_d. 1 has no memory.

    Cost: no pass; a classifier twice as wide.

    Avoid: batches with few rows of a domain, whose mean is mostly noise; and tests on a domain
    whose features lie far from all training domains'.
    """

    ema: float = 0.99
    noted: Noted = state(Noted)

    def validate(self) -> None:
        """Refuse settings out of range."""
        require(0 < self.ema <= 1, f"trainer.mtl.ema={self.ema}: above 0, at most 1")

    def adapt(self, model: nn.Module, domains: int) -> None:
        """Widen the classifier; refuse one that is more than a linear layer."""
        linear = model.classifier
        if not isinstance(linear, nn.Linear):
            raise UserError(
                f"mtl needs a classifier that is one linear layer, not {type(linear).__name__}"
            )
        model.classifier = DomainHead(linear, domains)

    def loss(self, run: Run, batch: Batch) -> Loss:
        """The inner loss; note the means of this batch for the tap."""
        head_of(run).ema = self.ema
        out = self.inner.loss(run, batch)
        self.noted.note(run, batch.by_domain(out.features).mean(dim=1))
        return out

    def after_step(self, run: Run) -> None:
        """Move the embeddings on."""
        means, embeddings = self.noted.take(), head_of(run).embeddings
        if means is not None:
            embeddings.lerp_(means.to(embeddings.dtype), self.ema)


class DomainHead(nn.Module):
    """Features (N, F) to logits (N, classes), by way of each domain's mean features.

    In training mode rows are ordered by domain, the same number of each. `embeddings` (domains, F)
    are the means so far.
    """

    embeddings: Tensor

    def __init__(self, linear: nn.Linear, domains: int) -> None:
        super().__init__()
        weight, width = linear.weight.detach(), linear.in_features
        linear.weight = nn.Parameter(torch.cat([weight, torch.zeros_like(weight)], dim=1))
        linear.in_features = 2 * width
        self.linear = linear
        self.register_buffer("embeddings", weight.new_zeros(domains, width))
        self.ema = 1.0

    def forward(self, features: Tensor) -> Tensor:
        """Logits; in evaluation mode those of a domain like the mean of all training domains."""
        if self.training:
            rows = features.reshape(len(self.embeddings), -1, features.shape[1])
            means = self.ema * mean(rows.mean(dim=1)) + (1 - self.ema) * self.embeddings
            context = means[:, None].expand_as(rows).flatten(0, 1)
        else:
            context = self.embeddings.mean(dim=0).expand_as(features)
        logits: Tensor = self.linear(torch.cat([features, context.to(features.dtype)], dim=1))
        return logits


def head_of(run: Run) -> DomainHead:
    """The widened classifier of the live model."""
    head = run.model.classifier
    assert isinstance(head, DomainHead)
    return head
