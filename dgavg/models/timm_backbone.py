"""Any backbone of the timm library."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from dgavg.errors import UserError, require
from dgavg.models.model import Model, normalized
from dgavg.models.pretrained import download, load_weights
from dgavg.models.registry import model


@model("timm")
def timm_backbone(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    backbone: str,
    weights: str | None = None,
) -> Model:
    """Any timm backbone by name, for example `backbone=tf_efficientnet_lite0`.

    F is the backbone's own pooled width. Images are normalised as its pretrained weights expect, or
    by 0.5 and 0.5 where they have other than its number of channels. A backbone of fixed image size
    (most transformers) is built for the size in `input_shape`.

    `backbone` may name the weights too (`resnet50.tv_in1k`); `weights` is null for random ones,
    `default` for timm's download (where C is not 3, timm's own adaptation of the first layer), or a
    path to a file, see `load_weights`.

    Raises:
        UserError: timm is not installed, an unknown backbone, one that cannot take such images, or
            weights that cannot be had or do not fit.
    """
    try:
        import timm
    except ImportError as error:
        raise UserError(
            "model timm needs the timm library; install it with pip install 'dgavg[timm]'"
        ) from error
    if not timm.is_model(backbone):
        near = get_close_matches(backbone, timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise UserError(f"timm has no backbone {backbone!r}; {hint}timm.list_models() has them all")

    options: dict[str, Any] = {"num_classes": 0, "in_chans": input_shape[0]}

    def create() -> Any:
        config = timm.models.get_pretrained_cfg(backbone)
        if getattr(config, "fixed_input_size", False):
            options["img_size"] = input_shape[1:]
        return timm.create_model(backbone, pretrained=weights == "default", **options)

    try:
        net = download(create, f"of timm's {backbone}") if weights == "default" else create()
    except (RuntimeError, TypeError, AssertionError) as error:
        raise _refusal(backbone, input_shape, error) from error
    features = _measure(net, backbone, input_shape)
    config = net.pretrained_cfg
    mean, std = config["mean"], config["std"]
    if len(mean) != input_shape[0]:
        mean = std = [0.5] * input_shape[0]
    built = Model(normalized(net, mean, std), nn.Linear(features, classes))
    if weights is not None and weights != "default":
        load_weights(built, weights, first_conv=config.get("first_conv") or ())
    return built


def _measure(net: nn.Module, backbone: str, input_shape: tuple[int, int, int]) -> int:
    """F, from one image of zeros; statistics, generators and modes stay as they were."""
    net.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            shape = net(torch.zeros(1, *input_shape)).shape
    except (RuntimeError, AssertionError, ValueError) as error:
        raise _refusal(backbone, input_shape, error) from error
    finally:
        net.train()
    require(
        len(shape) == 2,
        f"timm backbone {backbone!r} gives features of shape {tuple(shape)}, not (N, F); "
        "write one that pools them",
    )
    return int(shape[1])


def _refusal(backbone: str, input_shape: tuple[int, int, int], error: Exception) -> UserError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return UserError(
        f"timm backbone {backbone!r} cannot be built for images of shape {tuple(input_shape)}: "
        f"{reason}; write another backbone or data.size"
    )
