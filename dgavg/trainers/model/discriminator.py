"""A domain discriminator: it learns to tell domains apart, the features to mislead it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgavg.batch import Batch
from dgavg.errors import require
from dgavg.run import Run
from dgavg.trainer import Trainer
from dgavg.trainers.loss.checks import check_weight
from dgavg.trainers.model.inside import first_features, seeded

WIDTH, HIDDEN = 256, 2  # DomainBed's MLP: two hidden layers


class Discriminator(nn.Module):
    """Features (N, F), and where `classes` is above 0 labels, to domain logits (N, domains)."""

    def __init__(self, features: int, domains: int, classes: int = 0) -> None:
        super().__init__()
        sizes = [features, *[WIDTH] * HIDDEN]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], domains))
        self.embedding = nn.Parameter(torch.randn(classes, features)) if classes else None

    def join(self, features: Tensor, labels: Tensor | None) -> Tensor:
        """What the layers read: features plus the embedding of probabilities (N, classes)."""
        if self.embedding is None or labels is None:
            return features
        return features + labels @ self.embedding

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits of what `join` gave."""
        logits: Tensor = self.layers(inputs)
        return logits


class _Reverse(torch.autograd.Function):
    """The identity, whose gradient is turned round and multiplied."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.weight * gradient, None


def reverse(features: Tensor, weight: float) -> Tensor:
    """The features themselves; their gradient is −weight times what comes back."""
    found: Tensor = _Reverse.apply(features, weight)
    return found


def adversary(
    discriminator: nn.Module,
    features: Tensor,
    batch: Batch,
    penalty: float,
    labels: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """The discriminator's loss: Σ weights · cross-entropy, evenly by default; a scalar.

    `penalty` multiplies the mean over rows of the squared slope of the cross-entropy in what the
    discriminator reads.
    """
    assert isinstance(discriminator, Discriminator)
    inputs = discriminator.join(features, labels)
    errors = F.cross_entropy(discriminator(inputs), batch.d, reduction="none")
    loss = errors.mean() if weights is None else torch.dot(weights, errors)
    if penalty == 0 or not inputs.requires_grad:
        return loss
    (slopes,) = torch.autograd.grad(errors.sum(), inputs, create_graph=True)
    return loss + penalty * slopes.square().sum(dim=1).mean()


def make(run: Run, name: str, *, conditional: bool) -> Discriminator:
    """A discriminator for the features of `run`, from weights of the link's own seed."""
    width = first_features(run).shape[1]
    with seeded(run, name):
        return Discriminator(width, len(run.names), run.classes if conditional else 0)


def check(name: str, weight: float, penalty: float, d_steps: int, lr_factor: float) -> None:
    """Refuse settings out of range."""
    check_weight(name, weight)
    where = f"trainer.{name}"
    require(penalty >= 0, f"{where}.grad_penalty={penalty}: a number from 0 on")
    require(d_steps >= 0, f"{where}.d_steps={d_steps}: a number of steps, or 0")
    require(lr_factor > 0, f"{where}.lr_factor={lr_factor}: a number above 0")


def take_turns(link: Trainer, run: Run, d_steps: int) -> None:
    """Before the optimizer steps, take the gradient from whoever rests: it stays as it is.

    `d_steps` steps of the discriminator alone, then one of all else, from `run.t` alone. It stands
    below every gradient link, so those see all gradients.
    """
    if d_steps:
        own = list(run.extras[link.name].parameters())
        rest = list(run.model.parameters())
        run.update.before_step.append(_resting(run, own, rest, d_steps))


def _resting(
    run: Run, own: list[nn.Parameter], rest: list[nn.Parameter], d_steps: int
) -> Callable[[], None]:
    def drop() -> None:
        for parameter in rest if run.t % (d_steps + 1) < d_steps else own:
            parameter.grad = None

    return drop
