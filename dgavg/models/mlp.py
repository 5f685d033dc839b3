"""A multilayer perceptron on pixels."""

from __future__ import annotations

from math import prod

from torch import nn

from dgavg.errors import require
from dgavg.models.model import Model, check_dropout
from dgavg.models.registry import model


@model("mlp")
def mlp(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    width: int = 256,
    depth: int = 2,
    batchnorm: bool = True,
    dropout: float = 0.0,
) -> Model:
    """Multilayer perceptron: `depth` hidden layers of `width`, batch norm, ReLU, dropout.

    F is `width`; with `depth=0` the featurizer only flattens, which leaves a linear model.

    Raises:
        UserError: a width below 1, a depth below 0, or a dropout outside [0, 1).
    """
    require(width >= 1, f"model.width={width} is too small for model mlp; write 1 or more")
    require(depth >= 0, f"model.depth={depth} is too small for model mlp; write 0 or more")
    check_dropout(dropout)
    layers: list[nn.Module] = [nn.Flatten()]
    features = prod(input_shape)
    for _ in range(depth):
        layers.append(nn.Linear(features, width))
        if batchnorm:
            layers.append(nn.BatchNorm1d(width))
        # one entry, so that weights have the same names with dropout and without
        relu = nn.ReLU()
        layers.append(nn.Sequential(relu, nn.Dropout(dropout)) if dropout > 0 else relu)
        features = width
    return Model(nn.Sequential(*layers), nn.Linear(features, classes))
