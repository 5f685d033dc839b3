"""Model: what every trainer trains, a featurizer and a classifier."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dgavg.errors import require


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
    learned: weight averages and saved files have nothing to do with constants. `channels_last` is
    how images come out.
    """

    mean: Tensor
    std: Tensor
    channels_last = True

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images, the shape of x, channels last: a third faster through convolutions."""
        x = (x - self.mean) / self.std
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

    def extra_repr(self) -> str:
        """Both constants, for the printout of a model."""
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


class Featurizer(nn.Sequential):
    """`normalize`, `backbone` and `dropout`, the first and last only where they do something.

    So the names in the state dict are the backbone's own behind `backbone.`, whatever the
    normalisation and the dropout, which acts on the features.

    With `freeze_bn` the backbone's batch-norm layers stay in evaluation mode, also after `train()`:
    they normalise by the running statistics they came with, which never move, while their scale
    and shift are trained. As DomainBed's `freeze_bn` (Gulrajani and Lopez-Paz 2020, arXiv
    2007.01434, `domainbed/networks.py`). Layers that are put into it later are not frozen.

    Raises:
        UserError: a dropout outside [0, 1).
    """

    def __init__(
        self,
        backbone: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        freeze_bn: bool = False,
        dropout: float = 0.0,
    ) -> None:
        check_dropout(dropout)
        parts: dict[str, nn.Module] = {}
        if any(m != 0 for m in mean) or any(s != 1 for s in std):
            parts["normalize"] = Normalize(mean, std)
        parts["backbone"] = backbone
        if dropout > 0:
            parts["dropout"] = nn.Dropout(dropout)
        super().__init__(OrderedDict(parts))
        for layer in backbone.modules():
            if freeze_bn and isinstance(layer, _BatchNorm):
                layer.frozen = True  # type: ignore[assignment]  # a plain attribute, copied with it
        self.train(self.training)

    def train(self, mode: bool = True) -> Featurizer:
        """Training or evaluation mode for all but frozen layers, which stay in evaluation mode."""
        super().train(mode)
        for layer in self.modules():
            if getattr(layer, "frozen", False):
                layer.training = False
        return self


def lay_out(model: nn.Module) -> None:
    """Lay the weights of a model that normalises images out channels last, as it does the images.

    A tenth faster through convolutions on a CPU, more in half precision on a GPU.
    """
    if any(isinstance(m, Normalize) for m in model.modules()):
        model.to(memory_format=torch.channels_last)


def check_dropout(dropout: float) -> None:
    """Raise `UserError` for a share of features that can't be dropped."""
    require(0 <= dropout < 1, f"model.dropout={dropout} is outside [0, 1); write 0 for none")


def backbone_of(featurizer: nn.Module) -> nn.Module:
    """The part of a featurizer that has weights."""
    return (
        featurizer.get_submodule("backbone") if isinstance(featurizer, Featurizer) else featurizer
    )
