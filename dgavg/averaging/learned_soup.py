"""Learned soups: how much each model counts is fitted to a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dgavg.averaging.mixture import Mixture, Source, require_same, several, tensors_of
from dgavg.averaging.parameters import named_tensors, names_of, real, wide

Loss = Callable[..., Tensor]


@dataclass(frozen=True, eq=False)
class LearnedSoup:
    """What `learned_soup` made.

    `coefficients` sum to 1: a float64 tensor (M,), or one for each layer by name. `temperature` is
    the factor of the logits that was learned with them, 1 where none was.
    """

    weights: dict[str, Tensor]
    coefficients: Tensor | dict[str, Tensor]
    temperature: float


@torch.enable_grad()
def learned_soup(
    models: Iterable[Source],
    model: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    *,
    lr: float = 0.05,
    by_layer: bool = False,
    temperature: bool = False,
) -> LearnedSoup:
    """The combination Σ αᵢ·θᵢ of models whose coefficients make a loss small.

    Wortsman et al. 2022, arXiv 2203.05482, appendix I: α is a softmax, uniform at the start,
    trained by AdamW without weight decay, a step for each of `batches`. `loss(model, batch)` is a
    scalar; with `temperature` it is `loss(model, batch, β)` and multiplies the logits by the tensor
    β, learned along. `by_layer` gives each layer (the tensors of one module) an α of its own.

    `model` lends its structure: while `loss` runs, it has the weights θ(α), and then its own again,
    untouched, whatever happens. Dropout and batch norm act in the mode it is in; gradients flow
    through parameters, while buffers are mixed with the same α.

    Memory: the combination, its gradient, and one model where `models` are functions that load
    them; each loads twice a batch, and once at the end.

    Raises `ValueError` for no models or batches, other names or shapes, and a loss that is not
    finite or does not depend on the weights.
    """
    learner = _Learner(list(several(models)), model, loss, by_layer)
    beta = torch.ones((), device=next(model.parameters()).device, requires_grad=temperature)
    learned = [learner.logits, beta] if temperature else [learner.logits]
    optimizer = torch.optim.AdamW(learned, lr=lr, weight_decay=0.0)
    steps = 0
    for batch in batches:
        optimizer.zero_grad()
        learner.backward((batch, beta) if temperature else (batch,), learned[1:], steps)
        optimizer.step()
        steps += 1
    if steps == 0:
        raise ValueError("coefficients were to be learned, but no batch came")
    alpha = learner.alpha().detach()
    shares: Tensor | dict[str, Tensor] = dict(zip(learner.layers, alpha, strict=True))
    return LearnedSoup(
        weights=learner.mixed(alpha).weights(),
        coefficients=shares if by_layer else alpha[0],
        temperature=beta.item(),
    )


class _Loss(nn.Module):
    """A module whose forward pass is the loss, for `functional_call`."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *args: Any) -> Tensor:
        value = self.loss(self.model, *args)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise ValueError(
                "the loss must be one number that depends on the weights of the model it is given"
            )
        return value.reshape(())


class _Learner:
    """Coefficients (layers, M) and their gradients, with one model in memory at a time."""

    def __init__(
        self, models: Sequence[Source], model: nn.Module, loss: Loss, by_layer: bool
    ) -> None:
        if not models:
            raise ValueError("no models: a soup needs at least one")
        self.models, self.loss = models, _Loss(model, loss)
        saved = named_tensors(model)
        require_same(self._tensors(0), "models[0]", saved, "model")
        layer = {k: k.rpartition(".")[0] if by_layer else "" for k in saved}
        self.layers = {name: row for row, name in enumerate(dict.fromkeys(layer.values()))}
        self.row = {k: self.layers[name] for k, name in layer.items()}
        self.logits = torch.zeros(
            len(self.layers), len(models), dtype=torch.float64, requires_grad=True
        )
        plain = names_of(model)
        self.parameters = {k: plain[k] for k, _ in model.named_parameters()}  # tied ones once
        buffers = {k: plain[k] for k, _ in model.named_buffers()}
        self.buffers = {k: p for k, p in buffers.items() if p in saved}
        self.device = {p: saved[p].device for p in saved}

    def alpha(self) -> Tensor:
        """The coefficients (layers, M)."""
        return self.logits.softmax(dim=1)

    def mixed(self, alpha: Tensor) -> Mixture:
        """Σ αᵢ·θᵢ, moved from model to model by its share of those seen so far."""
        rates = (alpha / alpha.cumsum(dim=1)).nan_to_num(nan=1.0).tolist()
        mixture = Mixture(self._tensors(0), "models[0]")
        for i in range(1, len(self.models)):
            rate = {name: rates[row][i] for name, row in self.row.items()}
            mixture.add(self._tensors(i), rate, f"models[{i}]")
        return mixture

    def backward(self, args: tuple[Any, ...], others: Sequence[Tensor], step: int) -> None:
        """Leave the gradient of the loss in `.grad` of the logits and of `others`."""
        alpha = self.alpha()
        weights = {p: w.to(self.device[p]) for p, w in self.mixed(alpha.detach()).weights().items()}
        leaves = {k: weights[p] for k, p in self.parameters.items() if _is_float(weights[p])}
        swapped = {f"model.{k}": weights[p] for k, p in (self.parameters | self.buffers).items()}
        for leaf in leaves.values():
            leaf.requires_grad_()
        value = functional_call(self.loss, swapped, args)
        if not bool(value.isfinite()):
            raise ValueError(f"the loss of batch {step} is {value.item()}")
        found = torch.autograd.grad(value, [*leaves.values(), *others], allow_unused=True)
        for tensor, gradient in zip(others, found[len(leaves) :], strict=True):
            tensor.grad = gradient
        gradients = {
            self.parameters[k]: (g, leaf.detach())
            for (k, leaf), g in zip(leaves.items(), found, strict=False)
            if g is not None
        }
        alpha.backward(self._products(gradients))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _products(self, gradients: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
        """⟨g, θᵢ − θ⟩ (layers, M): dL/dα but for a constant, to which a softmax is blind.

        The difference comes first: models of one soup are close, and ⟨g, θᵢ⟩ would cancel.
        """
        found = torch.zeros_like(self.logits)
        rows = torch.tensor([self.row[name] for name in gradients], dtype=torch.int64)
        for i in range(len(self.models)):
            tensors = self._tensors(i)
            sums = [_dot(gradient, tensors[name], at) for name, (gradient, at) in gradients.items()]
            if sums:
                found[:, i].index_add_(0, rows, torch.stack([s.cpu().double() for s in sums]))
            del tensors  # before the next one is loaded
        return found

    def _tensors(self, i: int) -> dict[str, Tensor]:
        return tensors_of(self.models[i], f"models[{i}]")


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _dot(gradient: Tensor, end: Tensor, start: Tensor) -> Tensor:
    """⟨gradient, end − start⟩, real, in at least float32."""
    gradient, end, start = real(gradient), real(end), real(start)
    dtype = wide(gradient.dtype)
    return (gradient.to(dtype) * (end.to(start.device, dtype) - start.to(dtype))).sum()
