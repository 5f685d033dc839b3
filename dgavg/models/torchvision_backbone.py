"""Any classification network of the torchvision library."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from dgavg.errors import UserError, require
from dgavg.models.model import Featurizer, Model
from dgavg.models.pretrained import download, fit_weights, read_weights
from dgavg.models.probe import feature_width, no_backbone, refusal
from dgavg.models.registry import model

HEADS = ("fc", "classifier", "head", "heads")  # what torchvision calls the part that classifies
# They undo ImageNet's normalisation for one of their own, which is this one.
BY_HALF = ("googlenet", "inception_v3")
# Names in files that are older than those of the layers, which torchvision mends while loading.
RENAMED = (
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\."), r"\1\2."),
    (re.compile(r"\.mlp\.linear_1\."), ".mlp.0."),
    (re.compile(r"\.mlp\.linear_2\."), ".mlp.3."),
)


@model("torchvision")
def torchvision_backbone(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    backbone: str,
    weights: str | None = None,
    freeze_bn: bool = False,
    dropout: float = 0.0,
) -> Model:
    """Any torchvision classification network by name, for example `backbone=convnext_tiny`.

    Its last linear layer is the classifier; what comes before it in its head (a norm, a hidden
    layer, a dropout of its own) belongs to the featurizer. Images are normalised as its pretrained
    weights expect, or by 0.5 and 0.5 where they have other than 3 channels; then its first
    convolution is drawn anew (Kaiming's normal, fan out). Transformers of fixed image size
    (`vit_*`, `maxvit_t`) are built for the size in `input_shape`; pretrained position embeddings of
    a ViT are interpolated to it.

    `weights`, `freeze_bn` and `dropout` as for `resnet18`.

    Raises:
        UserError: an unknown network, one whose head ends in no linear layer, one that cannot take
            such images, a dropout outside [0, 1), or weights that cannot be had or do not fit.
    """
    return build_torchvision(backbone, input_shape, classes, weights, freeze_bn, dropout)


def build_torchvision(
    name: str,
    input_shape: tuple[int, int, int],
    classes: int,
    weights: str | None,
    freeze_bn: bool,
    dropout: float,
) -> Model:
    """The network called `name`, split; see `torchvision_backbone`."""
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        listing = "torchvision.models.list_models(module=torchvision.models)"
        raise no_backbone("torchvision", name, known, listing)
    require(
        not name.startswith("mnasnet"),
        f"torchvision's {name} takes no averaged weights (it refuses a plain state dict); write "
        "model=timm model.backbone=mnasnet_100 or another backbone",
    )
    published = torchvision.models.get_model_weights(name)
    named = "DEFAULT" if weights == "default" else weights
    chosen = published[named] if named in published.__members__ else None
    mean, std = _normalisation(published.DEFAULT)  # the same for a run's weights, of any origin
    require(
        chosen is None or _normalisation(chosen) == (mean, std),
        f"model.weights={weights}: these weights want other images than {name}'s others; write "
        "model.weights=default",
    )
    what = f"torchvision backbone {name!r}"
    options = _options(name, input_shape, what)
    try:
        net: Any = torchvision.models.get_model(name, num_classes=classes, **options)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise refusal(what, input_shape, error) from error
    channels, first = input_shape[0], _first_conv(net)
    if channels != 3:
        _widen(net, first, channels)
    classifier = _split(net, what)
    feature_width(net, what, input_shape)  # does it take such images?

    if channels != 3 or name in BY_HALF:
        mean = std = (0.5,) * channels
    featurizer = Featurizer(net, mean, std, freeze_bn=freeze_bn, dropout=dropout)
    built = Model(featurizer, classifier)
    if chosen is not None:
        state = download(
            lambda: chosen.get_state_dict(progress=False, check_hash=True), f"{name} {chosen.name}"
        )
        fit_weights(built, _fitting(net, state), str(chosen), first)
    elif weights is not None:
        fit_weights(built, _fitting(net, read_weights(weights)), str(weights), first)
    return built


def _options(name: str, input_shape: tuple[int, int, int], what: str) -> dict[str, Any]:
    """What a network's builder needs to know beside the number of classes."""
    if name.startswith("vit_"):
        height, width = input_shape[1:]
        require(
            height == width,
            f"{what} takes square images, not {height}×{width}; write another backbone or size",
        )
        return {"image_size": height}
    if name.startswith("maxvit_"):
        return {"input_size": input_shape[1:]}
    if name in BY_HALF:  # no classifiers beside the last one; nothing is said of how it is drawn
        return {"aux_logits": False, "init_weights": True}
    return {}


def _first_conv(net: nn.Module) -> str:
    """The name of the convolution that reads the image."""
    convs = (name for name, part in net.named_modules() if isinstance(part, nn.Conv2d))
    return str(next(convs))


def _widen(net: nn.Module, name: str, channels: int) -> None:
    """Give the first convolution another number of channels, as torchvision fills a ResNet's."""
    old: Any = net.get_submodule(name)
    new = nn.Conv2d(
        channels,
        old.out_channels,
        kernel_size=old.kernel_size,
        stride=old.stride,
        padding=old.padding,
        bias=old.bias is not None,
    )
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    net.set_submodule(name, new)


def _split(net: Any, what: str) -> nn.Linear:
    """Take the last linear layer out of the network's head; an identity stands in its place."""
    for name in HEADS:
        head = getattr(net, name, None)
        if isinstance(head, nn.Linear):
            setattr(net, name, nn.Identity())
            return head
        if isinstance(head, nn.Sequential) and isinstance(head[-1], nn.Linear):
            last = head[-1]
            head[-1] = nn.Identity()
            return last
    raise UserError(
        f"{what} ends in no linear layer that could be replaced; write another, such as resnet50"
    )


def _normalisation(weights: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What published weights take from an image, and divide it by."""
    preset = weights.transforms()
    return tuple(preset.mean), tuple(preset.std)


def _fitting(net: Any, state: dict[str, Any]) -> dict[str, Any]:
    """`state` by the layers' names of now, with position embeddings as many as they are.

    Without the classifiers beside the last one, which were left out of the network.
    """
    for old, new in RENAMED:
        state = {old.sub(new, name): tensor for name, tensor in state.items()}
    if hasattr(net, "aux_logits"):
        state = {k: v for k, v in state.items() if not k.lower().startswith("aux")}
    positions = "encoder.pos_embedding"
    if positions in state and state[positions].shape != net.state_dict()[positions].shape:
        from torchvision.models.vision_transformer import interpolate_embeddings

        state = dict(interpolate_embeddings(net.image_size, net.patch_size, dict(state)))
    return state
