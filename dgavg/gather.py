"""Gather: rows of all processes as one batch, with gradients that are exact to any order.

Each process runs the model on its share of a batch. A penalty is no mean over rows, so a mean of
penalties of shares would be another method. Outputs are therefore gathered, and every process
computes the loss of the whole batch. What each then holds as the slope of a number is kept to one
rule: **the mean over processes of what they hold is the true slope**, times the number of processes
where the number is one process's own.

- `gather` makes shared rows of own ones. The loss is computed alike everywhere, so its slope in the
  shared rows is the true one; a process takes its own rows of it, times the number of processes.
  What comes below is this process's part of the whole gradient, times that number: `Update` takes
  the mean over processes, which is the sum of the parts. A parameter that acts after the gathering
  (a discriminator) has the whole gradient on every process, and so has the mean of equal ones.
- The slope of that step back is `gather` again, so slopes of slopes (IGA's) are those of the whole
  batch too.
- `mean` is shared, of own values; its slope is the mean of the slopes, by the rule itself.

One process alone has all rows: everything here then gives back what it gets.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dgavg.averaging.batchnorm import statistics_layers
from dgavg.distributed import rank, ranks


def gather(own: Tensor, domains: int) -> Tensor:
    """The rows (N, ...) of all processes, from each process's own (N / processes, ...).

    Both are ordered by domain, and within a domain by process.
    """
    if ranks() == 1:
        return own
    found: Tensor = _Gather.apply(own, domains)
    return found


def own_rows(rows: Tensor, domains: int) -> Tensor:
    """This process's rows of those of all: what it gave to `gather`."""
    if ranks() == 1:
        return rows
    apart = rows.reshape(domains, ranks(), -1, *rows.shape[1:])
    return apart[:, rank()].flatten(0, 1)


def mean(own: Tensor) -> Tensor:
    """The mean over processes of what each has."""
    if ranks() == 1:
        return own
    found: Tensor = _Mean.apply(own)
    return found


def made_by(shared: Tensor) -> Any:
    """The node of autograd's graph that made a tensor, or the own rows it was gathered from."""
    node = shared.grad_fn
    gathered = getattr(node, "_forward_cls", None) is _Gather
    return node.next_functions[0][0] if node is not None and gathered else node


@torch.no_grad()
def same_on_all(module: nn.Module) -> None:
    """Give every process the first one's parameters and buffers."""
    if ranks() > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            dense = tensor.contiguous()
            dist.broadcast(dense, src=0)
            tensor.copy_(dense)


@torch.no_grad()
def average_statistics(*modules: nn.Module) -> None:
    """Make the running statistics of normalisation layers their means over processes.

    In training each process normalises by its own rows, as under `DistributedDataParallel`; so do
    its statistics follow its own rows. They are averaged in float64, which leaves equal ones equal.
    """
    if ranks() == 1:
        return
    layers = [layer for module in modules for layer in statistics_layers(module)]
    found = [t for m in layers for t in (m.running_mean, m.running_var) if t is not None]
    if found:
        flat = mean(torch.cat([t.flatten().double() for t in found]))
        parts = torch.split(flat.to(found[0].dtype), [t.numel() for t in found])
        pairs = zip(parts, found, strict=True)
        torch._foreach_copy_(found, [part.view_as(t) for part, t in pairs])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, domains: int) -> Tensor:
        ctx.domains = domains
        parts = own.new_empty(ranks() * len(own), *own.shape[1:])
        dist.all_gather_into_tensor(parts, own.contiguous())
        apart = parts.reshape(ranks(), domains, -1, *own.shape[1:])
        return apart.transpose(0, 1).flatten(0, 2)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        return _Own.apply(slope, ctx.domains), None


class _Own(torch.autograd.Function):
    """Own rows times the number of processes: the slope of gathering."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, domains: int) -> Tensor:
        ctx.domains = domains
        return ranks() * own_rows(rows, domains)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(slope, ctx.domains), None


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        found = own.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(found)
        return found / ranks()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        found: Tensor = _Mean.apply(slope)
        return found
