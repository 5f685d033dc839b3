"""What links that train something beside the model have to know of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dgavg.run import Run


def featurizer_of(run: Run) -> nn.Module:
    """The part of the model that makes features."""
    found = run.model.featurizer
    assert isinstance(found, nn.Module)
    return found


def first_features(run: Run) -> Tensor:
    """The features (1, F) of one training image, with everything in evaluation mode."""
    featurizer, image = featurizer_of(run), run.batches(0).x[:1].to(run.device)
    with torch.no_grad(), evaluating(featurizer):
        features: Tensor = featurizer(image)
    return features


@contextmanager
def evaluating(module: nn.Module, parts: list[nn.Module] | None = None) -> Iterator[None]:
    """`parts` of a module, by default all, are in evaluation mode in the block."""
    parts = list(module.modules()) if parts is None else parts
    before = [part.training for part in parts]
    try:
        for part in parts:
            part.training = False
        yield
    finally:
        for part, training in zip(parts, before, strict=True):
            part.training = training


@contextmanager
def seeded(run: Run, name: str) -> Iterator[None]:
    """What draws from torch's global generator in the block draws the link's own numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(run.random(name).integers(2**63)))
        yield
