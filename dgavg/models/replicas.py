"""Replicas: modules of one structure, whatever their forward code, run as one by `torch.vmap`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from dgavg.models.model import Normalize


class Replicas(nn.Module):
    """R modules as one: (R·N, ...) to (R·N, ...), the N rows of the first, then of the second, …

    `stacked` is a module like each of them whose tensors hold theirs side by side, with an axis of
    R in front. A pass is one call of its forward code under `torch.vmap` over those tensors;
    running statistics are each module's own. What draws random numbers is an error.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.count = len(modules)
        self.stacked = _side_by_side(modules)

    def forward(self, x: Tensor) -> Tensor:
        """(R·N, ...) of (R·N, ...)."""
        tensors = dict(self.stacked.named_parameters()), dict(self.stacked.named_buffers())
        rows = x.reshape(self.count, -1, *x.shape[1:])
        with _Wide():
            out: Tensor = torch.vmap(self._one)(tensors, rows)
        return out.flatten(0, 1)

    def _one(self, tensors: Any, x: Tensor) -> Tensor:
        out: Tensor = functional_call(self.stacked, tensors, (x,))
        return out


def _side_by_side(modules: Sequence[nn.Module]) -> nn.Module:
    found = copy.deepcopy(modules[0])
    each = [dict(module.named_modules()) for module in modules]
    for name, layer in found.named_modules():
        layers = [parts[name] for parts in each]
        for key, _ in list(layer.named_parameters(recurse=False)):
            both = torch.stack([k.get_parameter(key).detach() for k in layers])
            setattr(layer, key, nn.Parameter(both))
        for key, _ in list(layer.named_buffers(recurse=False)):
            setattr(layer, key, torch.stack([k.get_buffer(key) for k in layers]))
        if isinstance(layer, Normalize):
            layer.channels_last = False  # vmap knows no memory formats
    return found


class _Wide(TorchFunctionMode):
    """Under vmap, calls that `WIDE` knows are made once for all models, not by the rules of vmap.

    Those take a call apart below autocast, which then casts nothing, and scale and shift what a
    norm gives in passes of their own.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in WIDE:
            call, tensors = WIDE[func](*args, **(kwargs or {}))
            return _Call.apply(call, *tensors)
        return func(*args, **(kwargs or {}))


class _Call(torch.autograd.Function):
    """`call(R, *tensors)` with the channels of R models side by side: of x, (N, R·C, ...)."""

    @staticmethod
    def forward(call: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
        """The call for tensors that are of no model."""
        return call(1, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing: autograd sees what `vmap` does."""

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        call: Callable[..., Tensor],
        x: Tensor,
        *others: Tensor | None,
    ) -> tuple[Tensor, int]:
        """The layer's output (N, R, C, ...), and which axis is R."""
        _, dim, *dims = in_dims
        assert dim is not None
        merged = [
            other.movedim(d, 0).flatten(0, 1) if other is not None and d is not None else other
            for other, d in zip(others, dims, strict=True)
        ]
        out = call(info.batch_size, x.movedim(dim, 1).flatten(1, 2), *merged)
        return torch.unflatten(out, 1, (info.batch_size, -1)), 1


# What treats channels apart is, for all models side by side, one call for more channels.
Bound = tuple[Callable[..., Tensor], tuple[Tensor | None, ...]]


def _convolution(function: Callable[..., Tensor]) -> Callable[..., Bound]:
    def bound(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Bound:
        def call(count: int, *tensors: Tensor | None) -> Tensor:
            return function(*tensors, stride, padding, dilation, groups * count)

        return call, (x, weight, bias)

    return bound


def _group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Bound:
    def call(count: int, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.group_norm(x, num_groups * count, weight, bias, eps)

    return call, (x, weight, bias)


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *options: Any,
    **more: Any,
) -> Bound:
    def call(count: int, *tensors: Any) -> Tensor:
        return F.batch_norm(*tensors, *options, **more)

    return call, (x, running_mean, running_var, weight, bias)


WIDE: dict[Callable[..., Any], Callable[..., Bound]] = {
    **{function: _convolution(function) for function in (torch.conv1d, torch.conv2d, torch.conv3d)},
    F.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
}
