"""Model: what every trainer trains, a featurizer and a classifier."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Model(nn.Module):
    """featurizer (N, C, H, W) in [0, 1] -> (N, F); classifier (N, F) -> (N, classes) logits.

    Normalisation is the featurizer's business, so data are the same float32 images for every model.
    """

    featurizer: nn.Module
    classifier: nn.Module

    def __init__(self, featurizer: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.featurizer = featurizer
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) in [0, 1] to logits (N, classes)."""
        logits: Tensor = self.classifier(self.featurizer(x))
        return logits


class Normalize(nn.Module):
    """(x - mean) / std for each channel; x (N, C, H, W).

    The two buffers move with the model but stay out of its state dict, which holds only what is
    learned: weight averages and saved files have nothing to do with constants.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images, the shape of x, channels last: a third faster through convolutions."""
        return ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def extra_repr(self) -> str:
        """Both constants, for the printout of a model."""
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


def normalized(backbone: nn.Module, mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    """`backbone` behind a `Normalize` layer, or alone where mean is 0 and std is 1."""
    if all(m == 0 for m in mean) and all(s == 1 for s in std):
        return backbone
    return nn.Sequential(OrderedDict(normalize=Normalize(mean, std), backbone=backbone))


def backbone_of(featurizer: nn.Module) -> nn.Module:
    """The part of a featurizer that has weights: what `normalized` was given."""
    if isinstance(featurizer, nn.Sequential) and hasattr(featurizer, "normalize"):
        return featurizer.get_submodule("backbone")
    return featurizer
