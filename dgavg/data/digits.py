"""Data sets of digits: rotated, coloured, and from four sources."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dgavg.data.domains import Domain, DomainDataset
from dgavg.data.registry import dataset
from dgavg.data.sources import mnist, npz, optdigits
from dgavg.errors import require

DIGITS = tuple("0123456789")
ANGLES = (0.0, 15.0, 30.0, 45.0, 60.0, 75.0)


@dataset("digits_rotated")
def digits_rotated(
    *, angles: Sequence[float] = ANGLES, size: int = 16, shuffle_seed: int = 0
) -> DomainDataset:
    """scikit-learn's 1,797 real digits at six angles; no download (1×16×16, 10 classes).

    Each image is in one domain only. The 8×8 originals are resized to `size` pixels (bilinear) and
    turned counter-clockwise by `angles` degrees (bilinear, black outside).

    Source of the images: Alpaydin & Kaynak 1998, UCI Optical Recognition of Handwritten Digits.
    """
    require(size >= 1, f"data.size={size} must be at least 1 pixel")
    images, labels = _shuffled(*optdigits(), _generator(shuffle_seed))
    return _rotated("digits_rotated", _resized(images, size), labels, angles, None)


@dataset("rotated_mnist")
def rotated_mnist(
    *,
    root: str | None = None,
    angles: Sequence[float] = ANGLES,
    shuffle_seed: int = 0,
    limit: int | None = None,
    download: bool = False,
) -> DomainDataset:
    """DomainBed's RotatedMNIST: 70,000 digits at six angles (1×28×28, 10 classes).

    Training and test images together are shuffled and dealt out in turn; a domain is turned
    counter-clockwise by its angle in degrees (bilinear, black outside). The domains of
    `shuffle_seed=s` are those of DomainBed's `--seed s`. `limit` keeps the first images of each
    domain. Files: see `data_root`; `download` fetches them.

    Source: Ghifary et al. 2015 (arXiv 1508.07680), as in DomainBed's `RotatedMNIST`.
    """
    images, labels = _shuffled(*mnist(root, download), _generator(shuffle_seed))
    return _rotated("rotated_mnist", images, labels, angles, _checked(limit))


@dataset("colored_mnist")
def colored_mnist(
    *,
    root: str | None = None,
    shuffle_seed: int = 0,
    limit: int | None = None,
    download: bool = False,
) -> DomainDataset:
    """DomainBed's ColoredMNIST: is the digit below 5? Colour misleads (2×28×28, 2 classes).

    The label is flipped with probability 0.25, and the colour is the label flipped with probability
    0.1, 0.2 or 0.9 (domains +90%, +80%, -90%): channel `1 - colour` is black. The domains of
    `shuffle_seed=s` are those of DomainBed's `--seed s`. `limit` keeps the first images of each
    domain. Files: see `data_root`; `download` fetches them.

    Source: Arjovsky et al. 2019 (arXiv 1907.02893), as in DomainBed's `ColoredMNIST`.
    """
    limit = _checked(limit)
    rng = _generator(shuffle_seed)
    images, labels = _shuffled(*mnist(root, download), rng)
    domains = []
    for i, (name, flips) in enumerate((("+90%", 0.1), ("+80%", 0.2), ("-90%", 0.9))):
        grey, small = images[i::3], labels[i::3] < 5
        binary = small ^ (torch.rand(len(small), generator=rng) < 0.25)
        colour = binary ^ (torch.rand(len(small), generator=rng) < flips)
        grey, colour = grey[:limit], colour[:limit]
        painted = torch.cat(
            (grey * ~colour[:, None, None, None], grey * colour[:, None, None, None]), 1
        )
        domains.append(Domain(name, painted, binary[:limit].long()))
    return DomainDataset("colored_mnist", tuple(domains), ("5 and above", "below 5"))


@dataset("digits")
def digits(
    *,
    root: str | None = None,
    channels: int = 3,
    limit: int | None = None,
    shuffle_seed: int = 0,
    download: bool = False,
) -> DomainDataset:
    """Digits of four sources: MNIST, MNIST-M, USPS and scikit-learn's (3×28×28, 10 classes).

    All images of a source are one domain, shuffled by `shuffle_seed` and resized to 28×28
    (bilinear, antialiased); `limit` keeps the first of each. `channels` is 3 (grey repeated) or 1
    (MNIST-M as luma). Files: MNIST's idx files, `mnist_m.npz` and `usps.npz`; see `data_root`.
    `download` fetches MNIST alone.

    Sources: LeCun et al. 1998; Ganin & Lempitsky 2015 (arXiv 1409.7495); Hull 1994; Alpaydin &
    Kaynak 1998.
    """
    require(channels in (1, 3), f"data.channels={channels} must be 3 (colour) or 1 (grey)")
    limit = _checked(limit)
    sources = {
        "mnist": mnist(root, download),
        "mnist_m": npz(root, "mnist_m.npz", 32, 3),
        "usps": npz(root, "usps.npz", 16, 1),
        "optdigits": optdigits(),
    }
    domains = []
    for name, (images, labels) in sources.items():
        images, labels = _shuffled(images, labels, _generator(shuffle_seed), limit)
        if channels == 1 and images.shape[1] == 3:
            images = _luma(images)
        images = _resized(images, 28)
        if channels == 3 and images.shape[1] == 1:
            images = images.repeat(1, 3, 1, 1)
        domains.append(Domain(name, images, labels))
    return DomainDataset("digits", tuple(domains), DIGITS)


def _rotated(
    name: str, images: Tensor, labels: Tensor, angles: Sequence[float], limit: int | None
) -> DomainDataset:
    """Deal the images (N, 1, H, W) out to a domain for each angle, and turn them."""
    n = len(angles)
    require(n <= len(images), f"data.angles has {n} angles for {len(images)} images; give fewer")
    domains = [
        Domain(f"{angle:g}", _turned(images[i::n][:limit], angle), labels[i::n][:limit])
        for i, angle in enumerate(angles)
    ]
    return DomainDataset(name, tuple(domains), DIGITS)


def _turned(images: Tensor, angle: float) -> Tensor:
    """Turn uint8 (N, 1, H, W) counter-clockwise by degrees, with Pillow as DomainBed does."""
    turned = np.empty(images.shape, np.uint8)
    for image, out in zip(images.numpy(), turned, strict=True):
        out[0] = Image.fromarray(image[0]).rotate(angle, Image.Resampling.BILINEAR, fillcolor=0)
    return torch.from_numpy(turned)


def _resized(images: Tensor, size: int) -> Tensor:
    """Resize uint8 (N, C, H, W) to size × size, bilinear and antialiased."""
    if images.shape[2:] == (size, size):
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)


def _luma(images: Tensor) -> Tensor:
    """RGB uint8 (N, 3, H, W) → grey (N, 1, H, W), in Pillow's integer arithmetic."""
    r, g, b = images.to(torch.int32).chunk(3, dim=1)
    return ((19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16).to(torch.uint8)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _shuffled(
    images: Tensor, labels: Tensor, rng: torch.Generator, limit: int | None = None
) -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(images), generator=rng)[:limit]
    return images[order], labels[order]


def _checked(limit: int | None) -> int | None:
    require(limit is None or limit >= 1, f"data.limit={limit} must be at least 1, or null for all")
    return limit
