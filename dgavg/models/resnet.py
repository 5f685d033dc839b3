"""ResNet-18 and ResNet-50, torchvision's."""

from __future__ import annotations

from typing import Any

from torch import nn

from dgavg.models.model import Model, normalized
from dgavg.models.pretrained import download, fit_weights, load_weights
from dgavg.models.registry import model

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@model("resnet18")
def resnet18(
    input_shape: tuple[int, int, int], classes: int, *, weights: str | None = None
) -> Model:
    """ResNet-18 (He et al. 2015, arXiv 1512.03385), torchvision's, 512 features.

    `weights`: null for random ones, `default` for torchvision's newest, the name of one of its
    others, or a path to a file. See `load_weights` for what a file may hold and what is refused.
    """
    return _resnet("resnet18", input_shape, classes, weights)


@model("resnet50")
def resnet50(
    input_shape: tuple[int, int, int], classes: int, *, weights: str | None = None
) -> Model:
    """ResNet-50 (He et al. 2015, arXiv 1512.03385), torchvision's, 2048 features.

    `weights` as for `resnet18`. DomainBed and most papers use `IMAGENET1K_V1`; `default` is
    torchvision's newer `IMAGENET1K_V2`, which is several points better from the start.
    """
    return _resnet("resnet50", input_shape, classes, weights)


def _resnet(
    name: str, input_shape: tuple[int, int, int], classes: int, weights: str | None
) -> Model:
    """The network, its fully connected layer taken as the classifier."""
    import torchvision

    channels = input_shape[0]
    net: Any = getattr(torchvision.models, name)(num_classes=classes)
    if channels != 3:  # as torchvision makes and fills it, for other than three channels
        net.conv1 = nn.Conv2d(channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    classifier, net.fc = net.fc, nn.Identity()
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ([0.5] * channels,) * 2
    built = Model(normalized(net, mean, std), classifier)

    published = torchvision.models.get_model_weights(name)
    if weights == "default" or weights in published.__members__:
        chosen = published.DEFAULT if weights == "default" else published[weights]
        state = download(
            lambda: chosen.get_state_dict(progress=False, check_hash=True), f"{name} {chosen.name}"
        )
        fit_weights(built, state, str(chosen), first_conv="conv1")
    elif weights is not None:
        load_weights(built, weights, first_conv="conv1")
    return built
