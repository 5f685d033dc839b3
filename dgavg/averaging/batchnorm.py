"""Batch-norm recalibration: running statistics that fit the weights they are used with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def batchnorm_layers(model: nn.Module) -> list[_BatchNorm]:
    """The batch-norm layers of `model` that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


class _Moments:
    """Exact mean and variance per channel of all rows a layer saw, merged batch by batch.

    Chan, Golub and LeVeque 1983: no cancellation, and each batch counts by its rows.
    """

    def __init__(self) -> None:
        self.n = 0
        self.mean: Tensor = torch.zeros(())
        self.m2: Tensor = torch.zeros(())

    def take(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """A forward pre-hook; `inputs[0]` is (N, C, ...)."""
        x = inputs[0].detach().transpose(0, 1).flatten(1)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        n = x.shape[1]
        var, mean = torch.var_mean(x, dim=1, correction=0)
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        var, mean = var.to(wide), mean.to(wide)
        if self.n == 0:
            self.n, self.mean, self.m2 = n, mean, var * n
            return
        total = self.n + n
        delta = mean - self.mean
        self.mean = self.mean + delta * (n / total)
        self.m2 = self.m2 + var * n + delta.square() * (self.n * n / total)
        self.n = total

    def write(self, layer: _BatchNorm) -> None:
        """Make these the running statistics of `layer`: unbiased variance, as torch keeps it."""
        assert layer.running_mean is not None
        assert layer.running_var is not None
        layer.running_mean.copy_(self.mean)
        layer.running_var.copy_(self.m2 / max(self.n - 1, 1))


@contextmanager
def batchnorm_recalibration(
    model: nn.Module, layers: Sequence[_BatchNorm] | None = None
) -> Iterator[None]:
    """Forward passes in this block give `model` its batch-norm statistics anew.

    Inside, only the batch-norm `layers` (by default all, but where the model is in training mode
    those that are too, so frozen ones stay) normalise by the batch; everything else is in
    evaluation mode. On leaving, their running statistics are the exact moments over all rows they
    saw, and every mode is as it was. Feed it batches that mix all domains: deeper layers see inputs
    normalised by the batch.

    Raises `ValueError` where no batch came; after that, or any exception, the statistics are as
    before.
    """
    if layers is None:
        layers = [m for m in batchnorm_layers(model) if m.training or not model.training]
    modes = {m: m.training for m in model.modules()}
    tracked = {m: m.track_running_stats for m in layers}
    moments = {m: _Moments() for m in layers}
    hooks = [m.register_forward_pre_hook(moments[m].take) for m in layers]
    try:
        model.eval()
        for layer in layers:
            layer.train()
            layer.track_running_stats = False  # normalise by the batch, leave the statistics alone
        yield
        if moments and not any(found.n for found in moments.values()):
            raise ValueError("batch norm was to be recalibrated, but no batch came")
        for layer, found in moments.items():
            if found.n:  # a head that only training uses sees no batch
                found.write(layer)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
        for layer, mode in tracked.items():
            layer.track_running_stats = mode


@torch.no_grad()
def recalibrate_batchnorm(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] = lambda model, batch: model(batch),
) -> None:
    """Give `model` exact batch-norm statistics over `batches`; see `batchnorm_recalibration`."""
    with batchnorm_recalibration(model):
        for batch in batches:
            forward(model, batch)
