"""Augmentations of a whole batch on its own device, with other parameters for each image."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

TRIES = 10  # crops drawn for an image until one fits, as torchvision does


def none(x: Tensor, generator: Generator) -> Tensor:
    """The images as they are."""
    return x


def domainbed(x: Tensor, generator: Generator) -> Tensor:
    """DomainBed's training augmentation, of float (N, C, H, W) images in [0, 1].

    Random resized crop (area 0.7–1, aspect ratio 3/4–4/3), horizontal flip (p 0.5), colour jitter
    (brightness, contrast, saturation 0.7–1.3, hue ±0.3, in random order) and grayscale (p 0.1), as
    torchvision defines them (Gulrajani & Lopez-Paz 2021, arXiv 2007.01434). Every image has its
    own crop, flip, factors and grayscale; the order of the jitter is drawn once a batch, from the
    generator's seed. Images that have not three channels get no colour jitter and no grayscale.

    Two things differ from DomainBed: crops are taken from the image as it is stored, already
    resized, not from the original file; and pixels stay floats from one step to the next.
    """
    n, channels, height, width = x.shape
    u = torch.rand(2 * TRIES + 8, n, generator=generator, device=x.device)
    areas, ratios, (top, left, flip, b, c, s, h, gray) = u[:TRIES], u[TRIES:-8], u[-8:]
    boxes = crop_boxes(areas, ratios, top, left, height, width)
    x = crop_and_flip(x, *boxes, flip < 0.5)
    if channels != 3:
        return x
    changes: list[tuple[Callable[[Tensor, Tensor], Tensor], Tensor]] = [
        (adjust_brightness, 0.7 + 0.6 * b),
        (adjust_contrast, 0.7 + 0.6 * c),
        (adjust_saturation, 0.7 + 0.6 * s),
        (adjust_hue, 0.6 * h - 0.3),
    ]
    for i in _ORDERS[generator.initial_seed() % len(_ORDERS)]:
        adjust, factor = changes[i]
        x = adjust(x, factor)
    return torch.where(_column(gray < 0.1), luma(x), x)


AUGMENTATIONS: dict[str, Callable[[Tensor, Generator], Tensor]] = {
    "none": none,
    "domainbed": domainbed,
}
"""By name: float (N, C, H, W) in [0, 1] and a generator of its device → the same shape and range.

A pure function of the images and the seed of a freshly seeded generator."""

_ORDERS = tuple(permutations(range(4)))


def crop_boxes(
    areas: Tensor, ratios: Tensor, top: Tensor, left: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Crops as torchvision's `RandomResizedCrop` draws them, from uniform numbers in [0, 1).

    Shapes: `areas` and `ratios` (tries, N), `top` and `left` (N,). Gives top, left, height and
    width in whole pixels, each (N,): the first try that fits into the image, or else the largest
    centred crop of an allowed aspect ratio.
    """
    low, high = 3 / 4, 4 / 3
    area = height * width * (0.7 + 0.3 * areas)
    ratio = torch.exp(math.log(low) + (math.log(high) - math.log(low)) * ratios)
    w, h = torch.sqrt(area * ratio).round(), torch.sqrt(area / ratio).round()
    fits = (w <= width) & (h <= height)
    first = fits.to(torch.uint8).argmax(0, keepdim=True)  # the first of the maxima
    found = fits.any(0)
    w, h = w.gather(0, first)[0], h.gather(0, first)[0]
    y, x = (top * (height - h + 1)).floor(), (left * (width - w + 1)).floor()
    whole_w, whole_h = min(width, round(height * high)), min(height, round(width / low))
    return (
        torch.where(found, y, (height - whole_h) // 2),
        torch.where(found, x, (width - whole_w) // 2),
        torch.where(found, h, whole_h),
        torch.where(found, w, whole_w),
    )


def crop_and_flip(
    x: Tensor, top: Tensor, left: Tensor, h: Tensor, w: Tensor, flip: Tensor
) -> Tensor:
    """Cut the box (top, left, h, w) out of each image, resize it to the whole, flip it or not.

    Bilinear, and never past the edge of the box: `resized_crop` and `hflip` of torchvision.
    Shapes: `x` (N, C, H, W); all else (N,), pixels, `flip` bool.
    """
    height, width = x.shape[2:]
    ys = _positions(top, h, height)
    xs = _positions(left, w, width)
    xs = torch.where(flip[:, None], xs.flip(1), xs)
    shape = (len(x), height, width)
    grid_x = ((2 * xs + 1) / width - 1)[:, None, :].expand(shape)
    grid_y = ((2 * ys + 1) / height - 1)[:, :, None].expand(shape)
    grid = torch.stack((grid_x, grid_y), dim=-1)
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return x.clamp_(0, 1)  # its weights sum to 1 ± 1e-7


def _positions(start: Tensor, length: Tensor, size: int) -> Tensor:
    """Where `size` output pixels lie along one axis of the box, in image pixels: (N, size)."""
    centres = torch.arange(size, device=start.device) + 0.5
    inside = (centres * (length / size)[:, None] - 0.5).clamp_min(0)
    return start[:, None] + torch.minimum(inside, length[:, None] - 1)


def luma(x: Tensor) -> Tensor:
    """RGB (N, 3, H, W) → grey (N, 1, H, W), with torchvision's weights."""
    r, g, b = x.chunk(3, dim=1)
    return 0.2989 * r + 0.587 * g + 0.114 * b


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Scale RGB (N, 3, H, W) by a factor for each image, (N,)."""
    return (x * _column(factor)).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Scale RGB (N, 3, H, W) about each image's mean grey by a factor for each image, (N,)."""
    return torch.lerp(luma(x).mean((1, 2, 3), keepdim=True), x, _column(factor)).clamp_(0, 1)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Scale RGB (N, 3, H, W) about each pixel's grey by a factor for each image, (N,)."""
    return torch.lerp(luma(x), x, _column(factor)).clamp_(0, 1)


def adjust_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue of RGB (N, 3, H, W) by a part of a full turn for each image, (N,)."""
    r, g, b = x.chunk(3, dim=1)
    value, least = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = value - least
    sixth = 1 / chroma.clamp_min(torch.finfo(x.dtype).tiny)  # grey pixels have chroma 0: no effect
    hue = torch.where(
        value == r,
        (g - b) * sixth,
        torch.where(value == g, 2 + (b - r) * sixth, 4 + (r - g) * sixth),
    )
    # The inverse of HSV in closed form: channel k of (5, 3, 1) sixths of a turn further on.
    k = torch.arange(5, 0, -2, device=x.device, dtype=x.dtype)[:, None, None]
    k = (k + hue + 6 * _column(turn)).remainder_(6)
    return value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)


def _column(v: Tensor) -> Tensor:
    """(N,) → (N, 1, 1, 1)."""
    return v[:, None, None, None]
