"""What gradient links that take more than one pass have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dgavg.averaging.batchnorm import statistics_layers
from dgavg.batch import Batch, Loss
from dgavg.run import Run
from dgavg.trainer import Trainer

Pass = tuple[Loss, Sequence[Tensor | None]]  # the gradient of each of `run.parameters`, if any


@contextmanager
def put_back(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Whatever the block writes into `tensors`, they are afterwards as before; gives the copies."""
    before = [t.detach().clone() for t in tensors]
    try:
        yield before
    finally:
        if before:
            with torch.no_grad():
                torch._foreach_copy_(list(tensors), before)


@contextmanager
def statistics_kept(run: Run) -> Iterator[None]:
    """Passes in this block use batch statistics but leave the running ones as they are."""
    layers = [m for part in (run.model, run.extras) for m in statistics_layers(part)]
    batch = [m for m in layers if isinstance(m, _BatchNorm) and m.track_running_stats]
    instance = [m.running_mean for m in layers if not isinstance(m, _BatchNorm)]
    instance += [m.running_var for m in layers if not isinstance(m, _BatchNorm)]
    with put_back([t for t in instance if t is not None]):
        try:
            for layer in batch:
                layer.track_running_stats = False
            yield
        finally:
            for layer in batch:
                layer.track_running_stats = True


@contextmanager
def moved(run: Run, weights: Sequence[Tensor], by: Sequence[Tensor]) -> Iterator[None]:
    """In this block `weights` are moved `by` as much, and running statistics are kept."""
    with put_back(weights), statistics_kept(run):
        with torch.no_grad():
            torch._foreach_add_(list(weights), list(by))
        yield


def with_gradient(run: Run) -> tuple[list[nn.Parameter], list[Tensor]]:
    """The parameters that have a gradient now, and those gradients (the tensors themselves)."""
    there = [(p, p.grad) for p in run.parameters if p.grad is not None]
    return [p for p, _ in there], [g for _, g in there]


def norm_of(tensors: Sequence[Tensor]) -> Tensor:
    """The length of all tensors together; a scalar."""
    lengths: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors))))
    return lengths


@dataclass(slots=True)
class DomainGradients:
    """Each domain's gradient.

    `rows` (domains, P) are the gradients over all of `parameters` laid end to end; their mean is
    the whole gradient. A parameter that no domain reaches has zeros, and `reached` is false.
    """

    loss: Loss
    rows: Tensor
    parameters: list[nn.Parameter]
    reached: list[bool]

    def split(self, row: Tensor) -> list[Tensor]:
        """Views of a row (P,), one for each parameter, of its shape."""
        parts = torch.split(row, [p.numel() for p in self.parameters])
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]

    def write(self, row: Tensor) -> Loss:
        """Make `row` (P,) the gradient of this update; gives the loss."""
        for p, part, reached in zip(self.parameters, self.split(row), self.reached, strict=True):
            p.grad = part.to(p.dtype) if reached else None
        return self.loss


def domain_gradients(link: Trainer, run: Run, batch: Batch) -> DomainGradients:
    """Each domain's gradient of the loss of `batch`.

    That of domain d is the gradient of its risk, at D times its weight, and of all terms. One
    forward pass and D backward passes where no link below `link` changes gradients; else every
    such link is asked D times, once for each domain's risk, with batch-norm statistics of the first
    pass.
    """
    below = list(link.inner)[:-1]  # all but basic, whose gradient is that of the loss
    each = any(type(k).grad is not Trainer.grad for k in below)
    first = run.parameters[0]
    size = sum(p.numel() for p in run.parameters)
    rows = torch.empty(batch.domains, size, dtype=first.dtype, device=first.device)
    reached = [False] * len(run.parameters)
    losses = []
    for row, (loss, found) in zip(
        rows, (_asked if each else _shared)(link, run, batch), strict=True
    ):
        losses.append(loss)
        reached = [r or g is not None for r, g in zip(reached, found, strict=True)]
        pairs = zip(found, run.parameters, strict=True)
        torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs], out=row)
    weights = torch.stack([loss.weights for loss in losses]).mean(dim=0)
    return DomainGradients(replace(losses[0], weights=weights), rows, run.parameters, reached)


def _shared(link: Trainer, run: Run, batch: Batch) -> Iterator[Pass]:
    """The loss and the gradients for each domain in turn, from one forward pass."""
    loss = run.loss(batch)
    for d, choice in enumerate(_choices(batch)):
        one = replace(loss, weights=choice * loss.weights)
        yield one, run.gradients(one.total, retain=d + 1 < batch.domains)


def _asked(link: Trainer, run: Run, batch: Batch) -> Iterator[Pass]:
    """The same from the links below `link`, asked once for each domain."""
    even = torch.full((batch.domains,), 1 / batch.domains, device=batch.x.device)
    weights = even if batch.weights is None else batch.weights
    for d, choice in enumerate(_choices(batch)):
        with statistics_kept(run) if d else nullcontext():
            loss = link.inner.grad(run, replace(batch, weights=choice * weights))
        yield loss, [p.grad for p in run.parameters]


def _choices(batch: Batch) -> Tensor:
    """Row d takes D times domain d and nothing of the others."""
    return batch.domains * torch.eye(batch.domains, device=batch.x.device)
