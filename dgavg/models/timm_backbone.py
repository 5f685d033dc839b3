"""Any backbone of the timm library."""

from __future__ import annotations

from typing import Any

from torch import nn

from dgavg.errors import UserError
from dgavg.models.model import Featurizer, Model
from dgavg.models.pretrained import download, load_weights
from dgavg.models.probe import feature_width, no_backbone, refusal
from dgavg.models.registry import model


@model("timm")
def timm_backbone(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    backbone: str,
    weights: str | None = None,
    freeze_bn: bool = False,
    dropout: float = 0.0,
) -> Model:
    """Any timm backbone by name, for example `backbone=tf_efficientnet_lite0`.

    F is the backbone's own pooled width. Images are normalised as its pretrained weights expect, or
    by 0.5 and 0.5 where they have other than its number of channels. A backbone of fixed image size
    (most transformers) is built for the size in `input_shape`.

    `backbone` may name the weights too (`resnet50.tv_in1k`); `weights` is null for random ones,
    `default` for timm's download (where C is not 3, timm's own adaptation of the first layer), or a
    path to a file, see `load_weights`. `freeze_bn` and `dropout` as for `resnet18`.

    Raises:
        UserError: timm is not installed, an unknown backbone, one that cannot take such images, a
            dropout outside [0, 1), or weights that cannot be had or do not fit.
    """
    try:
        import timm
    except ImportError as error:
        raise UserError(
            "model timm needs the timm library; install it with pip install 'dgavg[timm]'"
        ) from error
    if not timm.is_model(backbone):
        raise no_backbone("timm", backbone, timm.list_models(), "timm.list_models()")

    options: dict[str, Any] = {"num_classes": 0, "in_chans": input_shape[0]}

    def create() -> Any:
        config = timm.models.get_pretrained_cfg(backbone)
        if getattr(config, "fixed_input_size", False):
            options["img_size"] = input_shape[1:]
        return timm.create_model(backbone, pretrained=weights == "default", **options)

    what = f"timm backbone {backbone!r}"
    try:
        net = download(create, f"of timm's {backbone}") if weights == "default" else create()
    except (RuntimeError, TypeError, AssertionError) as error:
        raise refusal(what, input_shape, error) from error
    features = feature_width(net, what, input_shape)
    config = net.pretrained_cfg
    mean, std = config["mean"], config["std"]
    if len(mean) != input_shape[0]:
        mean = std = [0.5] * input_shape[0]
    featurizer = Featurizer(net, mean, std, freeze_bn=freeze_bn, dropout=dropout)
    built = Model(featurizer, nn.Linear(features, classes))
    if weights is not None and weights != "default":
        load_weights(built, weights, first_conv=config.get("first_conv") or ())
    return built
