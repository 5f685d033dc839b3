"""The quantile of a few numbers, smoothed by Gaussian kernels, and its gradient."""

from __future__ import annotations

from statistics import NormalDist

import torch
from torch import Tensor

CUTS, ROUNDS = 256, 4  # of the search: 32 halvings


def smooth_quantile(values: Tensor, alpha: float, *, exact: bool) -> tuple[Tensor, Tensor]:
    """The alpha-quantile of a kernel density of values (D,), and its gradient in them (D,).

    The density is a Gaussian about each value, of width h = 1.06 · σ · D^(−1/5) (Silverman 1986),
    with σ the standard deviation of the values (divided by D − 1). Its quantile lies between
    min + h·z and max + h·z, with z the quantile of a standard normal. `exact` is the derivative of
    that quantile. Otherwise it is taken between these two ends at a fixed share, as autograd does
    through a search by halving: then only the least and the largest value, and h, have a slope.

    Of equal values, the quantile is that value and the gradient is even. Both come in the dtype of
    the values, and from float64 where there is one; nothing waits for the device.
    """
    x = values.detach().to(torch.float32 if values.device.type == "mps" else torch.float64)
    count = len(x)
    sigma = x.std()
    width = 1.06 * count**-0.2 * sigma
    width_slope = 1.06 * count**-0.2 * (x - x.mean()) / ((count - 1) * sigma)
    z = NormalDist().inv_cdf(alpha)
    least, most = x.min(), x.max()
    share = _search(x, least + width * z, most - least, width, alpha)
    found = least + width * z + share * (most - least)
    if exact:
        offsets = (found - x) / width
        density = torch.softmax(-offsets.square() / 2, dim=0)
        slope = density + (density * offsets).sum() * width_slope
    else:
        places = torch.arange(count, device=x.device)
        slope = (places == x.argmin()) * (1 - share) + (places == x.argmax()) * share
        slope = slope + z * width_slope
    slope = torch.where(most == least, torch.full_like(x, 1 / count), slope)
    return found.to(values), slope.to(values)


def _search(x: Tensor, low: Tensor, length: Tensor, width: Tensor, alpha: float) -> Tensor:
    """The share u in [0, 1] at which the distribution function at low + u · length is `alpha`.

    In `ROUNDS` rounds, each cuts what is left into `CUTS` equal parts and keeps one.
    """
    share = torch.zeros_like(low)
    part = 1.0
    cuts = torch.arange(1, CUTS, device=x.device, dtype=x.dtype)
    for _ in range(ROUNDS):
        part /= CUTS
        points = low + (share + part * cuts) * length
        below = torch.special.ndtr((points[:, None] - x) / width).mean(dim=1) <= alpha
        share = share + part * below.sum(dtype=x.dtype)
    return share + part / 2
