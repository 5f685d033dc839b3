"""Split: the images and labels that a run scores on, held where that is best."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dgavg.data.stream import Images


class Split:
    """Images and labels to score on.

    Shapes: `images` uint8 (N, C, H, W) or features, float (N, F, 1, 1); `labels` int64 (N,) on the
    device of the model. The images are there too, or wherever an `Images` holds them.
    """

    def __init__(self, images: Tensor | Images, labels: Tensor) -> None:
        self._images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def resident(self) -> bool:
        """Whether all images stand on the device."""
        return isinstance(self._images, Tensor) or self._images.resident

    @property
    def images(self) -> Tensor:
        """All images on the device; a copy, where they are not held there."""
        return self.take(slice(0, len(self)))

    def take(self, rows: slice | Tensor) -> Tensor:
        """Some images, on the device."""
        found = self.gather(rows)
        return found.to(self.labels.device, non_blocking=True)

    def batches(self, size: int) -> Iterator[Tensor]:
        """All images on the device, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.take(slice(start, start + size))

    def gather(self, rows: slice | Tensor) -> Tensor:
        """Some images, on the device if they are held there; any thread may call it."""
        if isinstance(self._images, Tensor):
            return self._images[rows]
        return self._images.rows(rows)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Images one after the other: on the device if some are there, and pinned if they all are."""
    if len(parts) == 1:
        return parts[0]
    device = next((p.device for p in parts if p.device.type != "cpu"), parts[0].device)
    pin = all(part.is_pinned() for part in parts)
    shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
    out = torch.empty(shape, dtype=parts[0].dtype, device=device, pin_memory=pin)
    return torch.cat([part.to(device) for part in parts], out=out)
