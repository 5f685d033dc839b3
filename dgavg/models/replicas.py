"""Replicas: modules of one structure, whatever their forward code, run as one by `torch.vmap`."""

from __future__ import annotations

import copy
import warnings
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
        # what vmap takes model by model is slower, not wrong, and no user's to mend
        warnings.filterwarnings("ignore", "There is a performance drop because we have not yet")

    def forward(self, x: Tensor) -> Tensor:
        """(R·N, ...) of (R·N, ...)."""
        tensors = dict(self.stacked.named_parameters()), dict(self.stacked.named_buffers())
        rows = x.reshape(self.count, -1, *x.shape[1:])
        with _Rules(x.device.type):
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


class _Rules(TorchFunctionMode):
    """Calls that torch's own rules for vmap take apart too far.

    The parts of a product stand below autocast, which then casts nothing; norms are scaled and
    shifted in passes of their own, which on bfloat16 fails.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        on = torch.is_autocast_enabled(kind)
        self.dtype = torch.get_autocast_dtype(kind) if on else None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in NORMS:
            call, tensors = NORMS[func](*args, **kwargs)
            return _Call.apply(call, *tensors)
        if self.dtype is not None and func in PRODUCTS:
            args = [self._cast(value) for value in args]
            kwargs = {key: self._cast(value) for key, value in kwargs.items()}
        return func(*args, **kwargs)

    def _cast(self, value: Any) -> Any:
        return value.to(self.dtype) if isinstance(value, Tensor) else value


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
        count, (_, dim, *dims) = info.batch_size, in_dims
        merged = [
            None if other is None else _of_each(other, d, 0, count).flatten(0, 1)
            for other, d in zip(others, dims, strict=True)
        ]
        out = call(count, _of_each(x, dim, 1, count).flatten(1, 2), *merged)
        return torch.unflatten(out, 1, (count, -1)), 1


def _of_each(tensor: Tensor, dim: int | None, to: int, count: int) -> Tensor:
    """`tensor` with its axis of models, now `dim`, at `to`; what has none is all models'."""
    return torch.stack([tensor] * count, to) if dim is None else tensor.movedim(dim, to)


# What treats channels apart is, for all models side by side, one call for more channels.
Bound = tuple[Callable[..., Tensor], tuple[Tensor | None, ...]]


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


NORMS: dict[Callable[..., Any], Callable[..., Bound]] = {
    F.batch_norm: _batch_norm,
    F.group_norm: _group_norm,
}
PRODUCTS = {
    *(torch.conv1d, torch.conv2d, torch.conv3d),
    *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
    F.linear,
}
