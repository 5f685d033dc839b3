"""Lent memory: for a block, a model's tensors stand where nothing else reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dgavg.averaging.parameters import all_tensors


@contextmanager
def lent(model: nn.Module, owner: Mapping[str, str]) -> Iterator[dict[str, Tensor]]:
    """For this block the tensors of `model` stand in fresh memory, which is yielded by name.

    `owner` gives the first name of each tied tensor: they share memory. Afterwards, come what may,
    the model has the tensors that it had, with the values that they had; but a buffer that got
    another shape, such as a cache that grew, stays. Memory: 1 model in the block.
    """
    live = all_tensors(model)
    before = {name: tensor.data for name, tensor in live.items()}
    parts = [(part, dict(part)) for m in model.modules() for part in (m._parameters, m._buffers)]
    try:
        fresh: dict[str, Tensor] = {}
        for name, tensor in live.items():
            first = owner[name]
            fresh[name] = fresh[first] if first in fresh else torch.empty_like(before[name])
            tensor.data = fresh[name]
        yield fresh
    finally:
        for name, tensor in live.items():
            tensor.data = before[name]
        for part, had in parts:
            _put_back(part, had)


def _put_back(part: MutableMapping[str, Any], had: Mapping[str, Any]) -> None:
    """The tensors that a module had, where it has none or others of the same shape now."""
    has = dict(part)  # those of scripted modules have no `get`
    for key, tensor in had.items():
        now = has.get(key)
        if tensor is not None and now is not tensor and (now is None or now.shape == tensor.shape):
            part[key] = tensor
