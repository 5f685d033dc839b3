"""Optimizers and learning-rate schedules by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from dgavg.errors import require, unknown
from dgavg.settings import check_settings

Parameters = Iterable[nn.Parameter]
SCHEDULES = ("constant", "linear", "cosine")


def adam(
    parameters: Parameters,
    *,
    lr: float,
    weight_decay: float = 0.0,
    beta1: float = 0.9,
    beta2: float = 0.999,
) -> torch.optim.Optimizer:
    """Adam (Kingma and Ba 2015, arXiv 1412.6980)."""
    options: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "betas": (beta1, beta2)}
    return torch.optim.Adam(parameters, **options, fused=True)


def adamw(
    parameters: Parameters,
    *,
    lr: float,
    weight_decay: float = 0.01,
    beta1: float = 0.9,
    beta2: float = 0.999,
) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101)."""
    options: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "betas": (beta1, beta2)}
    return torch.optim.AdamW(parameters, **options, fused=True)


def sgd(
    parameters: Parameters,
    *,
    lr: float,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    nesterov: bool = False,
) -> torch.optim.Optimizer:
    """Stochastic gradient descent with momentum."""
    return torch.optim.SGD(
        parameters,
        lr=lr,
        weight_decay=weight_decay,
        momentum=momentum,
        nesterov=nesterov,
        fused=True,
    )


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": adam,
    "adamw": adamw,
    "sgd": sgd,
}


def optimizer_factory(name: str, **settings: Any) -> Callable[[Parameters], torch.optim.Optimizer]:
    """A function from parameters to the optimizer called `name`.

    Raises `UserError` for an unknown name or setting and for a learning rate that is not positive.
    """
    if name not in OPTIMIZERS:
        raise unknown("optimizer", name, OPTIMIZERS)
    build = OPTIMIZERS[name]
    check_settings(build, settings, "optimizer")
    require(settings["lr"] > 0, f"optimizer.lr={settings['lr']}: a number above 0")
    for key in ("beta1", "beta2", "momentum"):
        value = settings.get(key, 0.0)
        require(0 <= value < 1, f"optimizer.{key}={value}: a number in [0, 1)")
    require(
        not settings.get("nesterov") or settings.get("momentum", 0.9) > 0,
        "optimizer.nesterov=true needs optimizer.momentum above 0",
    )
    decay = settings.get("weight_decay", 0)
    require(decay >= 0, f"optimizer.weight_decay={decay}: a number from 0 on")
    return lambda parameters: build(parameters, **settings)


def lr_schedule(name: str, warmup: int, steps: int) -> Callable[[int], float]:
    """The factor on the learning rate at step t: (t + 1)/warmup, then the schedule towards 0.

    Raises `UserError` for an unknown schedule and a warm-up as long as the run.

    >>> factor = lr_schedule("linear", warmup=2, steps=10)
    >>> [round(factor(t), 3) for t in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.125]
    """
    if name not in SCHEDULES:
        raise unknown("schedule", name, SCHEDULES, "optimizer.schedule")
    require(
        0 <= warmup < steps, f"optimizer.warmup={warmup}: fewer steps than the run has ({steps})"
    )

    def factor(t: int) -> float:
        if t < warmup:
            return (t + 1) / warmup
        done = (t - warmup) / (steps - warmup)
        return {
            "constant": 1.0,
            "linear": 1.0 - done,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
        }[name]

    return factor
