"""Stack: models of one structure trained as one network, whose tensors hold theirs side by side."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgavg.errors import UserError, require
from dgavg.models.model import Model

EACH = (nn.ReLU, nn.GELU, nn.SiLU, nn.ELU, nn.LeakyReLU, nn.Tanh, nn.Identity)


class Stack(nn.Module):
    """R models as one: for small ones, where a step costs more calls than arithmetic.

    Inputs are (R·N, ...), the N rows of the first model, then those of the second, and so are
    features (R·N, F) and logits (R·N, classes). `state_dict` has the names of one model, each
    tensor with an axis of R in front. No model's output or gradient depends on another's.

    Raises `UserError` for a model with a layer that has no stacked form; those that have: linear,
    1-D batch norm, flatten, and what acts on each number alone. Dropout has none, for its masks
    would depend on the neighbours, and neither has what is frozen, hooked or used twice.
    """

    def __init__(self, models: Sequence[Model]) -> None:
        super().__init__()
        for part in (models[0].featurizer, models[0].classifier):
            layers = [m for _, m in part.named_modules(remove_duplicate=False) if not _parts(m)]
            require(len(layers) == len(set(layers)), "stack: a layer is used twice: write stack=1")
        self.count = len(models)
        self.featurizer = Rows(_stacked([m.featurizer for m in models]), self.count)
        self.classifier = Rows(_stacked([m.classifier for m in models]), self.count)
        first = next(iter(models[0].featurizer.modules()))
        while _parts(first):
            first = _parts(first)[0]
        require(
            isinstance(first, nn.Flatten),
            f"stack: the model begins with {first}, not with nn.Flatten(): write stack=1",
        )
        self.train(models[0].training)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (R·N, classes) of inputs (R·N, ...)."""
        logits: Tensor = self.classifier(self.featurizer(x))
        return logits


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


def _parts(module: nn.Module) -> list[nn.Module]:
    return list(module.children())


def _plain(module: nn.Module) -> bool:
    """Whether a layer does what its class says, and all of it is trained."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks
    trained = all(p.requires_grad for p in module.parameters(recurse=False))
    return trained and not any(hooks) and not getattr(module, "frozen", False)


def _stacked(layers: Sequence[nn.Module]) -> nn.Module:
    """One layer that does what each of `layers`, which have one structure, does to its rows."""
    first: Any = layers[0]
    found: nn.Module | None = None
    kind = type(first) if _plain(first) else None
    if kind is nn.Sequential:
        parts = [dict(layer.named_children()) for layer in layers]
        found = nn.Sequential(OrderedDict((k, _stacked([p[k] for p in parts])) for k in parts[0]))
    elif kind is nn.Linear:
        found = StackedLinear(cast(Sequence[nn.Linear], layers))
    elif kind is nn.BatchNorm1d:
        if first.affine and first.track_running_stats and first.momentum is not None:
            found = StackedBatchNorm(cast(Sequence[nn.BatchNorm1d], layers))
    elif kind is nn.Flatten and (first.start_dim, first.end_dim) == (1, -1):
        found = nn.Identity()  # rows come flat
    elif kind in EACH:
        found = copy.deepcopy(first)
    if found is None:
        raise UserError(f"stack: no stacked form of {first} is known: write stack=1")
    return found
