"""StackedBatches: batch t of several runs, one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dgavg.batch import Batch
from dgavg.data.domains import DomainDataset, as_floats
from dgavg.data.sampler import BLOCK, TrainingBatches
from dgavg.data.stream import Images


class StackedBatches:
    """Batch t of R runs as one `Batch`: its domains are those of the first run, of the second, …

    Each run's rows are those that its own `TrainingBatches` would give. The weights of the domains
    are such that the mean risk is the sum of what each run would minimise, so that its gradients
    are those of each run. `labels` name the runs in the names of the domains. All must have the
    same number of domains and steps an epoch.

    The images of all domains stand on the device once, whatever the number of runs, or nowhere
    there, if they don't fit.
    """

    def __init__(
        self,
        dataset: DomainDataset,
        parts: Sequence[TrainingBatches],
        labels: Sequence[str],
        device: torch.device,
    ) -> None:
        self.parts, self.device = list(parts), device
        first = self.parts[0]
        self.names = tuple(
            f"{name} ({label})"
            for part, label in zip(parts, labels, strict=True)
            for name in part.names
        )
        self.classes, self.epoch_length = first.classes, first.epoch_length
        self.pool = Pool(dataset, device)
        domains = len(self.names)
        rows = first.rows(0).shape[1] // first.domains
        self._d = torch.arange(domains, device=device).repeat_interleave(rows)
        self._weights = torch.full((domains,), 1 / first.domains, device=device)
        self._places = [part.places for part in parts]
        self._block, self._keys, self._rows = -1, torch.empty(0), torch.empty(0)

    def __call__(self, t: int) -> Batch:
        """Batch t ≥ 0: x float32 (R · domains · batch_size, C, H, W), y and d int64."""
        block, step = divmod(t, BLOCK)
        if block != self._block:
            rows = [p[part.rows(block)] for p, part in zip(self._places, self.parts, strict=True)]
            self._keys, self._block = torch.cat(rows, dim=1), block
            self._rows = self._keys.to(self.device)
            if self.pool.kept.resident:  # else rows are looked up on the CPU
                self._keys = self._rows
        images = self.pool.take(self._keys[step])
        if self.parts[0].augments:
            each = zip(self.parts, images.chunk(len(self.parts)), strict=True)
            x = torch.cat([part.pixels(own, t) for part, own in each])
        else:
            x = as_floats(images)
        y = self.pool.labels.index_select(0, self._rows[step])
        return Batch(x, y, self._d, len(self.names), self._weights)


class Pool:
    """All images and labels of a data set, domain after domain, on a device."""

    def __init__(self, dataset: DomainDataset, device: torch.device) -> None:
        every = [(d.images, torch.arange(len(d))) for d in dataset.domains]
        self.kept = Images(every, device)
        self.labels = torch.cat([d.labels for d in dataset.domains]).to(device)

    def take(self, rows: Tensor) -> Tensor:
        """The images at rows (n,), as they are kept."""
        return self.kept.take(rows)

    def images(self, rows: Tensor) -> Tensor:
        """The images at rows (n,), float32 (n, C, H, W) in [0, 1]."""
        return as_floats(self.take(rows))
