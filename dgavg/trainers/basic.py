"""Basic: empirical risk minimisation, the innermost link of every chain."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from dgavg.batch import Batch, Loss
from dgavg.gather import gather
from dgavg.run import Run
from dgavg.trainer import Trainer, trainer


@trainer("basic", stackable=True)
class Basic(Trainer):
    """Empirical risk minimisation: the mean cross-entropy of all training domains (Vapnik 1998).

    The reference that every other link is measured against (Gulrajani and Lopez-Paz 2021, arXiv
    2007.01434): with a good protocol few methods beat it by much.

    Cost: one forward and one backward pass. Every other link's cost is added to it.

    Avoid: never; it ends every chain.
    """

    def step(self, run: Run, batch: Batch) -> Loss:
        """Prepare the batch, take the gradient, let the optimizer step."""
        lr = run.lr()
        for group, scale in zip(run.optimizer.param_groups, run.lr_scales, strict=True):
            group["lr"] = lr * scale
        loss = run.grad(run.prepare(batch))
        run.update.step()
        return loss

    def prepare(self, run: Run, batch: Batch) -> Batch:
        """The batch as it is."""
        return batch

    def grad(self, run: Run, batch: Batch) -> Loss:
        """The gradient of the chain's loss."""
        for parameter in run.parameters:  # also those that the optimizer was not given
            parameter.grad = None
        loss = run.loss(batch)
        run.backward(loss.total)
        return loss

    def loss(self, run: Run, batch: Batch) -> Loss:
        """Mean cross-entropy of each domain, equally weighted, over the rows of all processes."""
        own = *run.forward(batch.x), batch.y, batch.d
        features, logits, y, d = (gather(rows, batch.domains) for rows in own)
        batch = replace(batch, y=y, d=d)
        errors = F.cross_entropy(logits, batch.y, reduction="none")
        risks = batch.by_domain(errors).mean(dim=1)
        even = torch.full_like(risks, 1.0 / batch.domains)
        weights = even if batch.weights is None else batch.weights
        return Loss(risks, weights, logits, features, batch)

    def lr(self, run: Run) -> float:
        """The optimizer's learning rate times the run's schedule."""
        return run.base_lr * run.schedule(run.t)
