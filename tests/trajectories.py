"""Weights that wander: a small model and the states that it goes through, for averages."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def small_net(seed: int = 0) -> nn.Module:
    """Convolution, batch norm and two linear layers, with values of their own everywhere."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(45, 70), nn.Linear(70, 3)
    )
    wander(model, 0)
    return model


@torch.no_grad()
def wander(model: nn.Module, step: int) -> None:
    """One step of a random walk, in place; counters count."""
    random = torch.Generator().manual_seed(step)
    for tensor in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values():
        if tensor.is_floating_point() or tensor.is_complex():
            tensor.add_(torch.randn(tensor.shape, generator=random).to(tensor.dtype))
        elif tensor.dtype != torch.bool:
            tensor.add_(1)


def walk(model: nn.Module, updates: int = 50) -> Iterator[int]:
    """The model goes through `updates` states; yields their numbers from 1 on."""
    for step in range(1, updates + 1):
        wander(model, step)
        yield step


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the state dict."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], *, rtol: float = 1e-5, but: str = "-"
) -> None:
    """Tensor by tensor; of names that have `but` in them only that both have them."""
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        if but not in name:
            assert tensor.dtype == theirs[name].dtype, name
            assert torch.allclose(tensor, theirs[name], rtol=rtol, atol=rtol), name
