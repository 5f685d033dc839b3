"""The network that DomainBed takes for images of a shape."""

from __future__ import annotations

from dgavg.errors import require
from dgavg.models.cnn import cnn
from dgavg.models.model import Model
from dgavg.models.registry import model
from dgavg.models.timm_backbone import timm_backbone
from dgavg.models.torchvision_backbone import build_torchvision

AUGMIX = "resnet50.ram_in1k"


@model("domainbed")
def domainbed(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    weights: str | None = "IMAGENET1K_V1",
    freeze_bn: bool = True,
    dropout: float = 0.0,
    resnet18: bool = False,
) -> Model:
    """What DomainBed takes for the image size: its MNIST CNN at 28×28, else a ResNet-50.

    At 28×28 it is `cnn`, which is drawn at random and has no batch norm: none of the settings
    applies there. From 32×32 on it is `resnet50`, or `resnet18` where that is true. (For 32×32
    DomainBed has a Wide ResNet, which none of its data sets uses; here it is the ResNet, too.)

    `weights` as for `resnet50`, and `augmix` for timm's `resnet50.ram_in1k`, DomainBed's default
    since 2024-07. `freeze_bn` was DomainBed's only way until then, and published numbers rest on
    it; since then its default is false.

    Source: Gulrajani and Lopez-Paz, In Search of Lost Domain Generalization (arXiv 2007.01434),
    `domainbed/networks.py`.

    Raises:
        UserError: images smaller than 32×32 other than 28×28, `augmix` with `resnet18`, and what
            `resnet50` refuses.
    """
    height, width = input_shape[1:]
    if (height, width) == (28, 28):
        return cnn(input_shape, classes)
    require(
        min(height, width) >= 32,
        f"model domainbed takes images of 28×28, or 32×32 and more, not {height}×{width}; write "
        "another data.size, or model=mlp for features and small images",
    )
    if weights == "augmix":
        require(
            not resnet18,
            "model.weights=augmix are a ResNet-50's; write model.resnet18=false or other weights",
        )
        return timm_backbone(
            input_shape,
            classes,
            backbone=AUGMIX,
            weights="default",
            freeze_bn=freeze_bn,
            dropout=dropout,
        )
    name = "resnet18" if resnet18 else "resnet50"
    return build_torchvision(name, input_shape, classes, weights, freeze_bn, dropout)
