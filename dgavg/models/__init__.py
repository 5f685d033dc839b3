"""Models: a featurizer and a classifier, built by name; pretrained weights from a file.

>>> build_model("mlp", (1, 8, 8), 10, width=16).classifier
Linear(in_features=16, out_features=10, bias=True)
"""

from dgavg.models import (  # noqa: F401  (each registers itself)
    cnn,
    domainbed,
    mlp,
    resnet,
    timm_backbone,
    torchvision_backbone,
)
from dgavg.models.model import Featurizer, Model, Normalize
from dgavg.models.pretrained import load_weights
from dgavg.models.registry import MODELS, build_model, model

__all__ = [
    "MODELS",
    "Featurizer",
    "Model",
    "Normalize",
    "build_model",
    "load_weights",
    "model",
]
