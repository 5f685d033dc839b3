"""StackedRun: several runs of one chain trained as one, each with its own weights and batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dgavg.batch import Batch, Loss
from dgavg.chain import chain, spec_of
from dgavg.errors import require
from dgavg.models.stack import Stack
from dgavg.run import Run
from dgavg.trainer import Trainer


class StackedRun(Run):
    """A `Run` of R models in a `Stack`: forward and backward pass, optimizer and averages at once.

    Batches hold the R runs' domains one run after the other, as `StackedBatches` gives them; terms
    of the loss are named "r/link" for run r. With the same initial weights and batches each model
    comes to the weights that a run of its own gives, up to rounding (which Adam makes much of where
    the true gradient is 0, as for biases before batch norm): what a chain does to a stack, it does
    to each model. That is so for links that say so by their trait `stackable`: averages
    that treat each weight alone, and losses that are functions of one run's outputs.

    Raises `UserError` for other links, and for what looks at the gradients of all weights together:
    `clip` and fp16.
    """

    def __init__(self, trainer: Trainer | str, model: Stack, batches: Any, **options: Any) -> None:
        trainer = chain(trainer) if isinstance(trainer, str) else trainer
        check_stackable(trainer)
        for name in ("clip", "precision"):
            value = options.get(name)
            fine = value in (None, "fp32", "bf16")
            require(fine, f"a stack takes no {name}={value}: train such runs one by one")
        self.count = model.count
        self._given: tuple[Tensor, Tensor] | None = None  # the outputs of one model
        self._losses = any(type(k).loss is not Trainer.loss for k in trainer if k.inner is not None)
        super().__init__(trainer, model, batches, **options)

    def forward(self, x: Tensor, model: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """Features and logits of inputs `x`, of one model's while its loss is taken."""
        return super().forward(x, model) if self._given is None else self._given

    def loss(self, batch: Batch) -> Loss:
        """The sum of the models' losses, from one forward pass."""
        if not self._losses:
            return super().loss(batch)
        features, logits = (found.chunk(self.count) for found in self.forward(batch.x))
        x, y, d = (tensor.chunk(self.count) for tensor in (batch.x, batch.y, batch.d))
        domains = batch.domains // self.count
        found = []
        for r in range(self.count):
            self._given = features[r], logits[r]
            try:
                found.append(self.trainer.loss(self, Batch(x[r], y[r], d[r] - d[r][0], domains)))
            finally:
                self._given = None
        return Loss(
            torch.cat([one.risks for one in found]),
            torch.cat([one.weights for one in found]),
            torch.cat([one.logits for one in found]),
            torch.cat([one.features for one in found]),
            batch,
            {f"{r}/{k}": term for r, one in enumerate(found) for k, term in one.terms.items()},
        )


def check_stackable(head: Trainer) -> None:
    """Raise `UserError` for a chain with a link that can't treat several runs as one."""
    for link in head:
        require(
            link.stackable,
            f"stack: {link.name!r} in {spec_of(head)!r} looks at a run as a whole: write stack=1",
        )
