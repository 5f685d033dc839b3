"""Augmentations of a whole batch on its own device, with other parameters for each image."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import permutations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from dgavg.data.domains import as_floats
from dgavg.data.memory import floats

TRIES = 10  # crops drawn for an image until one fits, as torchvision does
PIXELS = 1 << 17  # of the images that are augmented at once on a CPU
LARGE = 1 << 14  # pixels from which on a CPU resizes images one by one
RED, GREEN, BLUE = 0.2989, 0.587, 0.114  # torchvision's weights of grey


def none(images: Tensor, generator: Generator) -> Tensor:
    """The images as they are, as floats."""
    return as_floats(images)


def domainbed(images: Tensor, generator: Generator) -> Tensor:
    """DomainBed's training augmentation of (N, C, H, W) images, uint8 or float in [0, 1].

    Random resized crop (area 0.7–1, aspect ratio 3/4–4/3), horizontal flip (p 0.5), colour jitter
    (brightness, contrast, saturation 0.7–1.3, hue ±0.3, in random order) and grayscale (p 0.1), as
    torchvision defines them (Gulrajani & Lopez-Paz 2021, arXiv 2007.01434). Every image has its
    own crop, flip, factors and grayscale; the order of the jitter is drawn once a batch, from the
    generator's seed. Images that have not three channels get no colour jitter and no grayscale.

    Two things differ from DomainBed: crops are taken from the image as it is stored, already
    resized, not from the original file; and pixels stay floats from one step to the next.

    On a CPU images go through all steps a few at a time, so that they stay in its cache.
    """
    n, channels, height, width = images.shape
    u = torch.rand(2 * TRIES + 8, n, generator=generator, device=images.device)
    areas, ratios, (top, left, flip, b, c, s, h, gray) = u[:TRIES], u[TRIES:-8], u[-8:]
    boxes = crop_boxes(areas, ratios, top, left, height, width)
    cut = _Crops(images, *boxes, flip < 0.5)
    factors = 0.7 + 0.6 * b, 0.7 + 0.6 * c, 0.7 + 0.6 * s, 0.6 * h - 0.3
    changes = adjust_brightness_, adjust_contrast_, adjust_saturation_, adjust_hue_
    order = _ORDERS[generator.initial_seed() % len(_ORDERS)]
    grey = gray < 0.1
    on_cpu = images.device.type == "cpu"
    chunk = max(1, PIXELS // (height * width)) if on_cpu else n
    out = floats(images.shape, images.device)
    with torch.inference_mode():  # a tenth faster; `out` is not one of its tensors
        for rows in map(slice, range(0, n, chunk), range(chunk, n + chunk, chunk)):
            x = cut(rows, out[rows])
            if channels != 3:
                continue
            for i in order:
                changes[i](x, factors[i][rows])
            if not on_cpu or grey[rows].any():  # to ask an accelerator were to wait for it
                torch.where(_column(grey[rows]), luma(x), x, out=x)
    return out


AUGMENTATIONS: dict[str, Callable[[Tensor, Generator], Tensor]] = {
    "none": none,
    "domainbed": domainbed,
}
"""By name: images (N, C, H, W), uint8 or float in [0, 1], and a generator of their device →
floats of that shape in [0, 1].

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
    return _Crops(x, top, left, h, w, flip)(slice(None), torch.empty_like(x))


class _Crops:
    """Boxes of images, each resized to the whole and flipped or not."""

    def __init__(
        self, images: Tensor, top: Tensor, left: Tensor, h: Tensor, w: Tensor, flip: Tensor
    ) -> None:
        self.images, (height, width) = images, images.shape[2:]
        ys, xs = _positions(top, h, height), _positions(left, w, width)
        xs = torch.where(flip[:, None], xs.flip(1), xs)
        self.one_by_one = images.device.type == "cpu" and height * width >= LARGE
        if self.one_by_one:
            self.rows, self.columns = _neighbours(ys, height), _neighbours(xs, width)
            self.buffers = torch.empty(3, *images.shape[1:])
        else:
            self.ys, self.xs = (2 * ys + 1) / height - 1, (2 * xs + 1) / width - 1

    def __call__(self, rows: slice, out: Tensor) -> Tensor:
        """Those of some images, float32 in [0, 1], written to `out` (n, C, H, W)."""
        images = self.images[rows]
        if self.one_by_one:
            for i, image in enumerate(images, rows.start or 0):
                self._resize(i, image, out[i - (rows.start or 0)])
            return out
        return _sample(as_floats(images), self.ys[rows], self.xs[rows], out)

    def _resize(self, i: int, image: Tensor, out: Tensor) -> None:
        """Between rows first, then between columns: 1.3 times as fast as `grid_sample`.

        NumPy takes columns twice as fast as torch.
        """
        x, a, b = self.buffers
        x.copy_(image)
        if image.dtype == torch.uint8:
            x.div_(255)
        first, second, share = (v[i] for v in self.rows)
        torch.index_select(x, 1, first, out=a)
        torch.index_select(x, 1, second, out=b)
        a.lerp_(b, share[:, None])
        first, second, share = (v[i] for v in self.columns)
        np.take(a.numpy(), first.numpy(), axis=2, out=x.numpy(), mode="clip")
        np.take(a.numpy(), second.numpy(), axis=2, out=b.numpy(), mode="clip")
        torch.lerp(x, b, share, out=out)


def _positions(start: Tensor, length: Tensor, size: int) -> Tensor:
    """Where `size` output pixels lie along one axis of the box, in image pixels: (N, size)."""
    centres = torch.arange(size, device=start.device) + 0.5
    inside = (centres * (length / size)[:, None] - 0.5).clamp_min(0)
    return start[:, None] + torch.minimum(inside, length[:, None] - 1)


def _neighbours(at: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The pixels on both sides of each position, and the share of the second."""
    first = at.floor()
    return first.long(), (first + 1).clamp_max(size - 1).long(), at - first


def _sample(x: Tensor, ys: Tensor, xs: Tensor, out: Tensor) -> Tensor:
    """The images (N, C, H, W) at rows and columns, -1 to 1, bilinear between pixels."""
    shape = (len(x), ys.shape[1], xs.shape[1])
    grid = torch.stack((xs[:, None, :].expand(shape), ys[:, :, None].expand(shape)), dim=-1)
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return torch.clamp(x, 0, 1, out=out)  # its weights sum to 1 ± 1e-7


def luma(x: Tensor) -> Tensor:
    """RGB (N, 3, H, W) → grey (N, 1, H, W), with torchvision's weights."""
    r, g, b = x.chunk(3, dim=1)
    return (r * RED).add_(g, alpha=GREEN).add_(b, alpha=BLUE)


def adjust_brightness_(x: Tensor, factor: Tensor) -> Tensor:
    """Scale RGB (N, 3, H, W) in place by a factor for each image, (N,)."""
    return x.mul_(_column(factor)).clamp_(0, 1)


def adjust_contrast_(x: Tensor, factor: Tensor) -> Tensor:
    """Scale RGB (N, 3, H, W) in place about each image's mean grey by a factor each, (N,)."""
    mean = luma(x.mean((2, 3), keepdim=True))
    factor = _column(factor)
    return x.mul_(factor).add_(mean.mul_(1 - factor)).clamp_(0, 1)


def adjust_saturation_(x: Tensor, factor: Tensor) -> Tensor:
    """Scale RGB (N, 3, H, W) in place about each pixel's grey by a factor for each image, (N,)."""
    grey = luma(x).mul_(_column(1 - factor))
    return x.mul_(_column(factor)).add_(grey).clamp_(0, 1)


def adjust_hue_(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue of RGB (N, 3, H, W) in place by at most a third of a full turn each, (N,).

    In sixths of a turn, with red at 0, the hue is ±(1 + (g + b - r - min) / (max - min)), + where
    g ≥ b; and a channel rises from min to max where its own hue is less than 2 away, and is max
    where that is less than 1.
    """
    r, g, b = x.chunk(3, dim=1)
    least = x.amin(1, keepdim=True)
    chroma = x.amax(1, keepdim=True).sub_(least)
    # Grey pixels have chroma 0: no effect, whatever their hue.
    hue = (g + b).sub_(r).sub_(least).div_(chroma.clamp_min(torch.finfo(x.dtype).tiny))
    hue = hue.add_(1).copysign_(g - b)
    own = torch.arange(-2, 4, 2, device=x.device).roll(-1)[:, None, None] - 6 * _column(turn)
    torch.sub(hue, own, out=x)  # within ±7, where | |x| - 3 | is right: 3 less the way around
    x.abs_().sub_(3).abs_().clamp_(1, 2)
    return torch.addcmul(least.sub_(chroma), x, chroma, out=x).clamp_(0, 1)


def _column(v: Tensor) -> Tensor:
    """(N,) → (N, 1, 1, 1)."""
    return v[:, None, None, None]
