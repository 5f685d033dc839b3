"""Stack: models of one structure trained as one network, whose tensors hold theirs side by side."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from dgavg.errors import require
from dgavg.models.model import Model
from dgavg.models.replicas import Replicas

EACH = (nn.ReLU, nn.GELU, nn.SiLU, nn.ELU, nn.LeakyReLU, nn.Tanh, nn.Identity)


class Stack(nn.Module):
    """R models as one: for small ones, where a step costs more calls than arithmetic.

    Inputs are (R·N, ...), the N rows of the first model, then those of the second, and so are
    features (R·N, F) and logits (R·N, classes). `state_dict` has the names of one model, each
    tensor with an axis of R in front. No model's output or gradient depends on another's.

    Linear layers, 1-D batch norm, flatten and what acts on each number alone have stacked forms of
    their own; a featurizer or classifier with anything else is run by `Replicas`.

    Raises `UserError` for dropout, whose masks would depend on the neighbours, and for what is
    frozen, hooked or used twice.
    """

    def __init__(self, models: Sequence[Model]) -> None:
        super().__init__()
        _check(models[0])
        self.count = len(models)
        self.featurizer = _stacked([m.featurizer for m in models], flat=False)
        self.classifier = _stacked([m.classifier for m in models], flat=True)
        self.train(models[0].training)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (R·N, classes) of inputs (R·N, ...)."""
        logits: Tensor = self.classifier(self.featurizer(x))
        return logits

    @property
    def layered(self) -> bool:
        """Whether every layer has a stacked form of its own."""
        return not any(isinstance(m, Replicas) for m in self.modules())

    def lend(self, models: Sequence[Model]) -> None:
        """Give each of `models` its tensors of this stack themselves, in the place of its own."""
        mine, device = self.state_dict(), next(self.parameters()).device
        for r, model in enumerate(models):
            model.to(device).load_state_dict(part(mine, r), assign=True)


def part(tensors: Mapping[str, Tensor], r: int) -> dict[str, Tensor]:
    """Of the tensors of a stack those of model `r`, by the names that the model has for them."""
    return {name.replace(".stacked", "", 1): tensor[r] for name, tensor in tensors.items()}


class Rows(nn.Module):
    """Runs stacked layers, which take (R, N, F), on rows: (R·N, ...) to (R·N, F)."""

    def __init__(self, stacked: nn.Module, count: int) -> None:
        super().__init__()
        self.stacked, self.count = stacked, count

    def forward(self, x: Tensor) -> Tensor:
        """(R·N, F) of (R·N, ...)."""
        out: Tensor = self.stacked(x.reshape(self.count, -1, x[0].numel()))
        return out.reshape(len(x), -1)


class StackedLinear(nn.Module):
    """R linear layers: (R, N, in) to (R, N, out)."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([k.weight.detach() for k in layers]))
        biases = [k.bias.detach() for k in layers if k.bias is not None]
        self.register_parameter("bias", nn.Parameter(torch.stack(biases)) if biases else None)

    def forward(self, x: Tensor) -> Tensor:
        """Each model's product with its own weights."""
        out: Tensor = _Products.apply(x, self.weight, self.bias)
        return out


class _Products(torch.autograd.Function):
    """x·Wᵀ + b of each model.

    What autograd makes of `bmm(x, W.mT)` is the gradient of Wᵀ, laid out another way than W.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        x, cast = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(x, cast)
        ctx.kind = weight.dtype
        if bias is None:
            return torch.bmm(x, cast.mT)
        return torch.baddbmm(bias.to(dtype).unsqueeze(1), x, cast.mT)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        wants_x, _, wants_bias = ctx.needs_input_grad
        return (
            torch.bmm(grad, weight) if wants_x else None,
            torch.bmm(grad.mT, x).to(ctx.kind),
            grad.sum(dim=1).to(ctx.kind) if wants_bias else None,
        )


class StackedBatchNorm(nn.Module):
    """R batch-norm layers: (R, N, F) to its shape, each model normalised by its own N rows.

    In `moments`, where that is set, the exact moments of all rows that come are collected, and what
    comes is normalised by itself; see `StackedMoments`.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, layers: Sequence[nn.BatchNorm1d]) -> None:
        super().__init__()
        first = layers[0]
        assert first.momentum is not None
        self.eps, self.momentum = first.eps, first.momentum
        self.moments: StackedMoments | None = None
        for name, _ in first.named_parameters():
            both = torch.stack([k.get_parameter(name).detach() for k in layers])
            self.register_parameter(name, nn.Parameter(both))
        for name, _ in first.named_buffers():
            self.register_buffer(name, torch.stack([k.get_buffer(name) for k in layers]))

    def forward(self, x: Tensor) -> Tensor:
        """Normalised, scaled and shifted."""
        if self.moments is not None:
            normal = self.moments.take(x, self.eps)
            return torch.addcmul(self.bias.unsqueeze(1), self.weight.unsqueeze(1), normal)
        if self.training:
            self.num_batches_tracked.add_(1)
        models, n, features = x.shape
        out = F.batch_norm(  # one layer of R·F features: a third of the time of (1, R·F, N)
            x.transpose(0, 1).reshape(n, models * features),
            self.running_mean.view(-1),
            self.running_var.view(-1),
            self.weight.view(-1),
            self.bias.view(-1),
            self.training,
            self.momentum,
            self.eps,
        )
        return out.view(n, models, features).transpose(0, 1).contiguous()


class StackedMoments:
    """Mean and squared deviations of all rows a stacked layer saw, merged batch by batch.

    As `dgavg.averaging.moments.Moments`, for R models (Chan, Golub and LeVeque 1983). `mask`, set
    before each batch, is (R, N, 1): 1 for a row, 0 for what only fills up a model's share.
    """

    def __init__(self, layer: StackedBatchNorm) -> None:
        self.layer, self.mask = layer, torch.empty(0)
        shape = layer.running_mean.shape
        self.n = torch.zeros(shape[0], 1, dtype=torch.float64, device=layer.running_mean.device)
        self.mean = torch.zeros(shape, dtype=torch.float64, device=self.n.device)
        self.m2 = torch.zeros_like(self.mean)

    def take(self, x: Tensor, eps: float) -> Tensor:
        """Note a batch (R, N, F); returns it normalised by its own rows, in float32."""
        x, mask = x.float(), self.mask
        n = mask.sum(dim=1)
        divisor = n.clamp(min=1)  # a model may have no row in this batch
        mean = (x * mask).sum(dim=1) / divisor
        deviations = (x - mean.unsqueeze(1)) * mask
        m2 = deviations.square().sum(dim=1)
        total, delta = (self.n + n).clamp(min=1), mean - self.mean
        self.mean += delta * (n / total)
        self.m2 += m2 + delta.square() * (self.n * n / total)
        self.n = self.n + n
        return deviations * torch.rsqrt(m2 / divisor + eps).unsqueeze(1)

    def write(self) -> None:
        """Make these the layer's running statistics."""
        self.layer.running_mean.copy_(self.mean)
        self.layer.running_var.copy_(self.m2 / (self.n - 1).clamp(min=1))


def _check(module: nn.Module) -> None:
    """Raise `UserError` for what a stack would change."""
    tensors = [*module.named_parameters(remove_duplicate=False)]
    once = len(tensors) == len({tensor for _, tensor in tensors})
    require(once, "stack: a layer is used twice: write stack=1")
    for layer in module.modules():
        hooks = (
            *(layer._forward_hooks, layer._forward_pre_hooks),
            *(layer._backward_hooks, layer._backward_pre_hooks),
        )
        trained = all(p.requires_grad for p in layer.parameters(recurse=False))
        for wrong, what in (
            (getattr(layer, "frozen", False) or not trained, "is frozen"),
            (any(hooks), "has hooks"),
            (isinstance(layer, _DropoutNd) and layer.p > 0, "would draw other masks"),
        ):
            name = str(layer).partition("(\n")[0]  # of one with parts, without them
            require(not wrong, f"stack: {name} {what}: write stack=1")


def _stacked(parts: Sequence[nn.Module], *, flat: bool) -> nn.Module:
    """What does what each of `parts`, which have one structure, does to its rows; are they flat?"""
    first = parts[0]
    while isinstance(first, nn.Sequential) and len(first):
        first = first[0]
    found = _layers(parts) if flat or isinstance(first, nn.Flatten) else None
    return Replicas(parts) if found is None else Rows(found, len(parts))


def _usual(norm: nn.BatchNorm1d) -> bool:
    return norm.affine and norm.track_running_stats and norm.momentum is not None


def _layers(layers: Sequence[nn.Module]) -> nn.Module | None:
    """One layer in the place of `layers`, if such layers have a stacked form."""
    first: Any = layers[0]
    kind = type(first)
    if kind is nn.Sequential:
        parts = [dict(layer.named_children()) for layer in layers]
        found = {k: _layers([p[k] for p in parts]) for k in parts[0]}
        known = OrderedDict((k, layer) for k, layer in found.items() if layer is not None)
        return nn.Sequential(known) if len(known) == len(found) else None
    if kind is nn.Linear:
        return StackedLinear(cast(Sequence[nn.Linear], layers))
    if kind is nn.BatchNorm1d and _usual(first):
        return StackedBatchNorm(cast(Sequence[nn.BatchNorm1d], layers))
    if kind is nn.Flatten and (first.start_dim, first.end_dim) == (1, -1):
        return nn.Identity()  # rows come flat
    return copy.deepcopy(first) if kind in EACH else None
