"""Fitting: as many rows at a time as the memory of the device has room for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Forward = Callable[[nn.Module, Tensor], Tensor]


class Fitting:
    """Passes images forward, in halves where the device has not the memory for all rows.

    How many rows fitted is kept for the passes that follow. Raises `torch.OutOfMemoryError` where
    one row does not fit, and for a model with `support`, whose predictions depend on the batch.
    """

    def __init__(self) -> None:
        self.most: int | None = None  # rows at a time; none is known to be too many

    def __call__(self, forward: Forward, model: nn.Module, images: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, C, H, W), by `forward(model, images)`."""
        rows = min(len(images), self.most or len(images))
        try:
            if rows == len(images):
                return forward(model, images)
            return torch.cat([forward(model, part) for part in torch.split(images, rows)])
        except torch.OutOfMemoryError:
            if rows <= 1 or getattr(model, "support", None) is not None:
                raise
            self.most = rows // 2
        torch.cuda.empty_cache()  # now that nothing holds what had been computed
        return self(forward, model, images)
