"""Ensembles: the outputs of models are added, not their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from dgavg.averaging.mixture import Source, several, tensors_of
from dgavg.averaging.parameters import wide


@torch.no_grad()
def ensemble(models: Iterable[Source], logits: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
    """The sum of the logits of models, in at least float32.

    The ensemble of EoA (Arpit et al. 2022, arXiv 2110.10832), where the models are averages of
    several runs: logits are added, not probabilities. `logits(weights)` gives those of all inputs,
    (N, classes); the models may be of different architectures if it can tell them apart.

    Memory: the sum, and one model where `models` are functions that load them.

    Raises `ValueError` for no models, and logits of another shape than the first.
    """
    total: Tensor | None = None
    for i, model in enumerate(several(models)):
        found = logits(tensors_of(model, f"models[{i}]"))
        if not isinstance(found, Tensor) or not found.is_floating_point():
            raise ValueError(f"the logits of models[{i}] are no floating tensor (N, classes)")
        if total is None:
            total = found.to(wide(found.dtype), copy=True)
        elif found.shape != total.shape:
            raise ValueError(
                f"the logits of models[{i}] are {tuple(found.shape)}, those before "
                f"{tuple(total.shape)}"
            )
        else:
            total += found.to(total.device, wide(found.dtype))
    if total is None:
        raise ValueError("no models: an ensemble needs at least one")
    return total
