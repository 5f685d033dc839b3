"""ResNet-18 and ResNet-50, torchvision's."""

from __future__ import annotations

from dgavg.models.model import Model
from dgavg.models.registry import model
from dgavg.models.torchvision_backbone import build_torchvision


@model("resnet18")
def resnet18(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    weights: str | None = None,
    freeze_bn: bool = False,
    dropout: float = 0.0,
) -> Model:
    """ResNet-18 (He et al. 2015, arXiv 1512.03385), torchvision's, 512 features.

    `weights`: null for random ones, `default` for torchvision's newest, the name of one of its
    others, or a path to a file. See `load_weights` for what a file may hold and what is refused.
    `freeze_bn`: batch-norm layers keep the running statistics of `weights` and normalise by them in
    training, too; their scale and shift are trained. `dropout`: share of the features that are
    dropped before the classifier in training.
    """
    return build_torchvision("resnet18", input_shape, classes, weights, freeze_bn, dropout)


@model("resnet50")
def resnet50(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    weights: str | None = None,
    freeze_bn: bool = False,
    dropout: float = 0.0,
) -> Model:
    """ResNet-50 (He et al. 2015, arXiv 1512.03385), torchvision's, 2048 features.

    `weights`, `freeze_bn` and `dropout` as for `resnet18`. DomainBed and most papers use
    `IMAGENET1K_V1` with `freeze_bn`; `default` is torchvision's newer `IMAGENET1K_V2`, which is
    several points better from the start.
    """
    return build_torchvision("resnet50", input_shape, classes, weights, freeze_bn, dropout)
