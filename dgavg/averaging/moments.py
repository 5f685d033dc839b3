"""Moments: what a normalisation layer's running statistics are estimates of, exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from dgavg.averaging.parameters import wide


class Moments:
    """Mean and squared deviations per channel of all rows a layer saw, merged batch by batch.

    Chan, Golub and LeVeque 1983: no cancellation, and each batch counts by its rows. Instance norm
    counts samples: `mean` is that of their means, and `m2` the sum of their unbiased variances.
    """

    def __init__(self, layer: _NormBase) -> None:
        assert layer.running_mean is not None
        assert layer.running_var is not None
        self.statistics = layer.running_mean, layer.running_var
        self.by_sample = isinstance(layer, _InstanceNorm)
        self.between = 0.0 if self.by_sample else 1.0  # do differences between means count?
        self.n = 0
        self.mean = torch.zeros_like(layer.running_mean, dtype=_wide(layer.running_mean))
        self.m2 = torch.zeros_like(self.mean)

    def take(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A forward pre-hook; the layer's input is (N, C, ...), of instance norm also (C, ...).

        Raises `ValueError` for another number of channels.
        """
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        if isinstance(layer, _InstanceNorm) and x.dim() == layer._get_no_batch_dim():  # type: ignore[no-untyped-call]
            x = x.unsqueeze(0)
        if x.dim() < 2 or x.shape[1] != len(self.mean):
            raise ValueError(
                f"a {type(layer).__name__} of {len(self.mean)} channels got {tuple(x.shape)}"
            )
        if x.numel() == 0:
            return
        n, mean, m2 = _of_samples(x) if self.by_sample else _of_rows(x)
        total = self.n + n
        delta = mean - self.mean
        self.mean = self.mean + delta * (n / total)
        self.m2 = self.m2 + m2 + delta.square() * (self.between * self.n * n / total)
        self.n = total

    def write(self) -> None:
        """Make these the layer's running statistics: unbiased variances, as torch keeps them."""
        if self.n == 0:  # a head that only training uses sees no batch
            return
        running_mean, running_var = self.statistics
        running_mean.copy_(self.mean)
        running_var.copy_(self.m2 / (self.n if self.by_sample else max(self.n - 1, 1)))


def _of_rows(x: Tensor) -> tuple[int, Tensor, Tensor]:
    """Count, mean and squared deviations per channel of the rows of (N, C, ...)."""
    mean, var = _mean_and_variance(x, [0, *range(2, x.dim())])
    n = x.numel() // len(mean)
    return n, mean, var * n


def _of_samples(x: Tensor) -> tuple[int, Tensor, Tensor]:
    """Count, mean of the means and sum of the unbiased variances of the samples of (N, C, ...)."""
    mean, var = _mean_and_variance(x, [*range(2, x.dim())])
    rows = x.numel() // mean.numel()
    return len(x), mean.mean(dim=0), var.sum(dim=0) * (rows / max(rows - 1, 1))


def _mean_and_variance(x: Tensor, dims: list[int]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over `dims`, summed in at least float32.

    On a CPU in two passes and what rounding left of the mean, a fifth of torch.var_mean's time.
    """
    x = x.to(wide(x.dtype))
    if x.device.type != "cpu":
        var, mean = torch.var_mean(x, dims, correction=0)
        return mean.to(_wide(x)), var.to(_wide(x))
    mean = x.mean(dims, keepdim=True)
    x = x - mean
    rest = x.mean(dims).double()
    var = x.square_().mean(dims).double() - rest.square()
    return mean.reshape(rest.shape).double() + rest, var


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def ranks() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def merge_ranks(moments: Sequence[Moments]) -> None:
    """Make each of `moments` that of all ranks: two sums over ranks for all layers together.

    The merge of Chan, Golub and LeVeque 1983 for any number of parts. Every rank must call this.
    """
    device = moments[0].mean.device  # one that the backend knows: the model's
    widths = [len(m.mean) for m in moments]
    counts = torch.tensor([m.n for m in moments], dtype=torch.float64, device=device)
    between = torch.tensor([m.between for m in moments], dtype=torch.float64, device=device)

    def by_channel(values: Tensor) -> Tensor:
        return values.repeat_interleave(torch.tensor(widths, device=device))

    means = torch.cat([m.mean.to(device) for m in moments])
    sums = torch.cat([counts, by_channel(counts) * means])
    dist.all_reduce(sums)
    totals, mean = sums[: len(widths)], sums[len(widths) :]
    mean = mean / by_channel(totals)  # NaN where no rank saw a row, and never written
    m2 = torch.cat([m.m2.to(device) for m in moments])
    m2 = m2 + by_channel(between * counts) * (means - mean).square()
    dist.all_reduce(m2)
    parts = pairwise(accumulate(widths, initial=0))
    for found, n, (i, j) in zip(moments, totals.tolist(), parts, strict=True):
        found.n, found.mean, found.m2 = int(n), mean[i:j], m2[i:j]
