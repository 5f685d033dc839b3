"""Models: a featurizer and a classifier, built by name; pretrained weights from a file.

>>> build_model("mlp", (1, 8, 8), 10, width=16).classifier
Linear(in_features=16, out_features=10, bias=True)
"""

from dgavg.models import cnn, mlp, resnet, timm_backbone  # noqa: F401  (each registers itself)
from dgavg.models.model import Model, Normalize
from dgavg.models.pretrained import load_weights
from dgavg.models.registry import MODELS, build_model, model

__all__ = [
    "MODELS",
    "Model",
    "Normalize",
    "build_model",
    "load_weights",
    "model",
]
