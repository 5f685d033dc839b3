"""TrainingBatches: batch t of a run as a pure function of (seed, t)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dgavg.batch import Batch
from dgavg.data.augment import AUGMENTATIONS
from dgavg.data.domains import DomainDataset, as_floats
from dgavg.data.splits import Splits, seed_hash
from dgavg.data.stream import Ahead, Images, ahead
from dgavg.distributed import rank, ranks
from dgavg.errors import require, unknown

BLOCK = 64  # steps whose rows are drawn at once


class TrainingBatches:
    """Batches of `batch_size` random rows of each training domain, ordered by domain.

    Where several processes train together, these are the rows of all of them: process r of n gets
    rows r·`batch_size`/n to (r + 1)·`batch_size`/n of each domain, and crops of its own.

    Rows are drawn uniformly with replacement, as DomainBed's `InfiniteDataLoader` does. Which rows
    make batch t follows from (seed, t) alone; with an augmentation the pixels do too, on one kind
    of device. The global random state is neither read nor changed.

    The training parts of the domains live on `device` in one tensor, so a batch is one gather, or
    else a thread brings the next batches there: `resident` says which, and None measures what fits.
    The batches are the same to the bit.

    `domains` is how many training domains there are, `names` are theirs, and `epoch_length` is how
    many steps show the smallest of them once: the least of `len(in) // batch_size`. `places` (n,)
    says where each training image stands among all images of the data set, domain after domain.

    Raises `UserError` for no training domain, one twice or one that does not exist, an unknown
    augmentation, a training domain with fewer images than one batch needs, and a batch that the
    processes can't share evenly.
    """

    def __init__(
        self,
        dataset: DomainDataset,
        splits: Splits,
        train_domains: Sequence[int],
        *,
        batch_size: int,
        seed: int,
        device: torch.device | str,
        augment: str = "none",
        resident: bool | None = None,
    ) -> None:
        where = f"data set {dataset.name!r}"
        require(
            len(train_domains) > 0, f"no domain of {where} is left to train on; name at least 1"
        )
        for i, domain in enumerate(train_domains):
            require(
                0 <= domain < len(dataset.domains) and domain not in train_domains[:i],
                f"training domains {list(train_domains)} of {where} must be different numbers in "
                f"0..{len(dataset.domains) - 1}",
            )
        if augment not in AUGMENTATIONS:
            raise unknown("augmentation", augment, AUGMENTATIONS)
        require(batch_size >= 1, f"protocol.batch_size={batch_size} must be at least 1")
        least = -(-batch_size // ranks()) * ranks()
        require(
            batch_size % ranks() == 0,
            f"protocol.batch_size={batch_size} images a domain can't be shared evenly by {ranks()} "
            f"processes; write protocol.batch_size={least}",
        )
        self.names = tuple(dataset.names[i] for i in train_domains)
        self.domains = len(self.names)
        self.classes = len(dataset.classes)
        self._sizes = [len(splits.in_[i]) for i in train_domains]
        for name, size in zip(self.names, self._sizes, strict=True):
            require(
                size >= batch_size,
                f"training domain {name!r} has {size} training images, fewer than "
                f"protocol.batch_size={batch_size}; set protocol.batch_size={size} or less",
            )
        self.epoch_length = min(self._sizes) // batch_size
        self._batch_size, self._seed, self._device = batch_size, seed, torch.device(device)

        keys = [torch.from_numpy(splits.in_[i]) for i in train_domains]
        sources = [dataset.domains[i] for i in train_domains]
        parts = [(source.images, k) for source, k in zip(sources, keys, strict=True)]
        labels = [source.labels[k] for source, k in zip(sources, keys, strict=True)]
        starts = np.cumsum([0, *(len(domain) for domain in dataset.domains)])
        self.places = torch.cat(
            [k + int(starts[i]) for i, k in zip(train_domains, keys, strict=True)]
        )
        self._images = Images(parts, self._device, resident)
        self._labels = torch.cat(labels).to(self._device)
        self._d = torch.arange(self.domains, device=self._device).repeat_interleave(
            batch_size // ranks()
        )

        self._augment = None if augment == "none" else AUGMENTATIONS[augment]
        self._augment_rng = torch.Generator(self._device)
        images, rows = self._images, _Rows(self._sizes, batch_size, seed)
        self._draw = rows.block
        self._ahead = Ahead(lambda t: images.gather(rows(t)))  # not of self: no cycle keeps it
        self._block = -1
        self._rows: tuple[Tensor, ...] = ()

    def __call__(self, t: int) -> Batch:
        """Batch t ≥ 0: x float32 (domains · batch_size, C, H, W) in [0, 1], y and d int64.

        Of several processes each has its share of the rows.
        """
        block, step = divmod(t, BLOCK)
        if block != self._block:
            self._rows, self._block = _to_device(self._draw(block), self._device).unbind(0), block
        rows = self._rows[step]
        if self._images.resident:
            images = self._images.take(rows)
        else:
            images = self._images.send(self._ahead(t))
        x = self.pixels(images, t)
        return Batch(x, self._labels.index_select(0, rows), self._d, self.domains)

    def pixels(self, images: Tensor, t: int) -> Tensor:
        """What training sees of the images of batch `t`: float32 in [0, 1], augmented."""
        if self._augment is None:
            return as_floats(images)
        own = (rank(),) if rank() else ()
        self._augment_rng.manual_seed(seed_hash("augment", self._seed, t, *own))
        return self._augment(images, self._augment_rng)

    @property
    def augments(self) -> bool:
        """Whether training images are changed at random."""
        return self._augment is not None

    def rows(self, block: int) -> Tensor:
        """Which training images make the `BLOCK` batches of a block: (BLOCK, n), into `places`."""
        return self._draw(block)

    def pooled_rows(self, batch_size: int) -> tuple[Tensor, ...]:
        """Which training images make each batch of `pooled`, as numbers into `places`."""
        require(batch_size >= 1, f"batch_size={batch_size} must be at least 1")
        return self._mixed.tensor_split(-(-len(self._mixed) // batch_size))

    def pooled(self, batch_size: int) -> Iterator[Tensor]:
        """All training images once, not augmented, in batches that mix the domains evenly.

        Yields x, float32 (n, C, H, W) in [0, 1], n ≤ `batch_size`. The order is always the same.
        Each batch has each domain's share of the images to within one or two, and no two batches
        differ in length by more than one: a plain mean over batches is then right for batch norm.
        Of several processes each has its share of the batches.
        """
        parts = self.pooled_rows(batch_size)[rank() :: ranks()]
        if self._images.resident:
            yield from (as_floats(self._images.take(rows)) for rows in parts)
        else:
            for images in ahead(self._images.gather, parts):
                yield as_floats(self._images.send(images))

    @cached_property
    def _mixed(self) -> Tensor:
        """All rows (n,), domains evenly mixed: on the device, if the images are."""
        rng = np.random.default_rng(0)
        # Image i of a shuffled domain of n stands at (i + 1/2) / n of the way through.
        place = np.concatenate([(rng.permutation(n) + 0.5) / n for n in self._sizes])
        rows = torch.from_numpy(np.argsort(place, kind="stable"))
        return rows.to(self._device) if self._images.resident else rows


class _Rows:
    """Which rows make batch t; `sizes` says how many each domain has."""

    def __init__(self, sizes: Sequence[int], batch_size: int, seed: int) -> None:
        self.sizes, self.batch_size, self.seed = tuple(sizes), batch_size, seed
        self._last: tuple[int, Tensor] = -1, torch.empty(0)

    def __call__(self, t: int) -> Tensor:
        """The rows of batch t: (domains · batch_size,), or this process's share of them."""
        number, step = divmod(t, BLOCK)
        last = self._last  # read once, for two threads ask
        if last[0] != number:
            self._last = last = number, self.block(number)
        return last[1][step]

    def block(self, number: int) -> Tensor:
        """The rows of each step of a block: (BLOCK, domains · batch_size), or the share."""
        rng = torch.Generator().manual_seed(seed_hash("batches", self.seed, number))
        parts, start = [], 0
        for size in self.sizes:
            parts.append(
                torch.randint(start, start + size, (BLOCK, self.batch_size), generator=rng)
            )
            start += size
        by_rank = torch.cat(parts, dim=1).view(BLOCK, len(self.sizes), ranks(), -1)
        return by_rank[:, :, rank()].flatten(1)


def _to_device(rows: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":  # pinned, so that the copy does not wait for the device
        rows = rows.pin_memory()
    return rows.to(device, non_blocking=True)
