"""What gradient links that take more than one pass have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from dgavg.averaging.batchnorm import batchnorm_layers
from dgavg.batch import Batch, Loss
from dgavg.run import Run
from dgavg.trainer import Trainer

Gradients = list[Tensor | None]  # one for each of `run.parameters`, if it has one


@contextmanager
def statistics_kept(run: Run) -> Iterator[None]:
    """Passes in this block use batch statistics but leave the running ones as they are."""
    parts = (run.model, run.extras)
    layers = [m for part in parts for m in batchnorm_layers(part) if m.track_running_stats]
    try:
        for layer in layers:
            layer.track_running_stats = False
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


@contextmanager
def put_back(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Whatever the block writes into `tensors`, they are afterwards as before; gives the copies."""
    before = [t.detach().clone() for t in tensors]
    try:
        yield before
    finally:
        with torch.no_grad():
            torch._foreach_copy_(list(tensors), before)


def with_gradient(run: Run) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters that have a gradient now, and those gradients (the tensors themselves)."""
    there = [(p, p.grad) for p in run.parameters if p.grad is not None]
    return [p for p, _ in there], [g for _, g in there]


def set_gradients(run: Run, gradients: Sequence[Tensor | None]) -> None:
    """Make `gradients`, one for each of `run.parameters`, the ones of this update."""
    for parameter, gradient in zip(run.parameters, gradients, strict=True):
        parameter.grad = gradient


def domain_gradients(link: Trainer, run: Run, batch: Batch) -> tuple[Loss, Gradients]:
    """The loss of `batch`, and each domain's gradient of it: their mean is the whole gradient.

    The gradient of domain d is that of its risk alone, at D times its weight, and of all terms.
    One forward pass and D backward passes where no link below `link` changes gradients; else every
    such link is asked D times, once for each domain's risk, with batch-norm statistics of the first
    pass. Gradients are (D, *shape of the parameter), or None where no domain has one.
    """
    links = list(link.inner)[:-1]  # all but basic, whose gradient is that of the loss
    if any(type(k).grad is not Trainer.grad for k in links):
        return _one_domain_at_a_time(link, run, batch)
    loss = run.loss(batch)
    terms = sum(loss.terms.values()) if loss.terms else None
    shared: Gradients = [None] * len(run.parameters)
    if isinstance(terms, Tensor) and terms.requires_grad:
        shared = run.gradients(terms, retain=True)
    found = []
    for d in range(batch.domains):
        risk = batch.domains * loss.weights[d] * loss.risks[d]
        own = run.gradients(risk, retain=d + 1 < batch.domains)
        found.append([_sum(a, b) for a, b in zip(own, shared, strict=True)])
    return loss, _stacked(run, found)


def _one_domain_at_a_time(link: Trainer, run: Run, batch: Batch) -> tuple[Loss, Gradients]:
    found: list[Gradients] = []
    losses: list[Loss] = []
    for choice in torch.eye(batch.domains, device=batch.x.device):
        one = replace(batch, weights=choice)
        if not losses:
            losses.append(link.inner.grad(run, one))
        else:
            with statistics_kept(run):
                losses.append(link.inner.grad(run, one))
        found.append([None if p.grad is None else p.grad.clone() for p in run.parameters])
    weights = torch.stack([loss.weights for loss in losses]).mean(dim=0)
    return replace(losses[0], weights=weights), _stacked(run, found)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b


def _stacked(run: Run, found: Sequence[Sequence[Tensor | None]]) -> Gradients:
    """By parameter instead of by domain; a domain without a gradient has zeros."""
    stacks: Gradients = []
    for parameter, parts in zip(run.parameters, zip(*found, strict=True), strict=True):
        there = [torch.zeros_like(parameter) if g is None else g for g in parts]
        none = all(g is None for g in parts)
        stacks.append(None if none else torch.stack(there).detach())
    return stacks
