"""The convolutional network of DomainBed's MNIST benchmarks."""

from __future__ import annotations

from torch import nn

from dgavg.models.model import Model
from dgavg.models.registry import model


@model("cnn")
def cnn(input_shape: tuple[int, int, int], classes: int, *, batchnorm: bool = False) -> Model:
    """DomainBed's MNIST_CNN: four 3×3 convolutions, group norm, mean pool to 128 features.

    Each convolution is followed by ReLU and only then by the norm, as in the original. `batchnorm`
    puts batch norm in the place of group norm, which is not DomainBed's. Takes any image size.

    Source: Gulrajani and Lopez-Paz, In Search of Lost Domain Generalization (arXiv 2007.01434),
    `domainbed/networks.py`.
    """
    layers: list[nn.Module] = []
    channels = input_shape[0]
    for out, stride in ((64, 1), (128, 2), (128, 1), (128, 1)):
        layers += [
            nn.Conv2d(channels, out, kernel_size=3, stride=stride, padding=1),
            nn.ReLU(),
            nn.BatchNorm2d(out) if batchnorm else nn.GroupNorm(8, out),
        ]
        channels = out
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return Model(nn.Sequential(*layers, *pool), nn.Linear(channels, classes))
