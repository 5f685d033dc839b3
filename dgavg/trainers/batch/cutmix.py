"""CutMix: train on images with a box of another image in them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dgavg.batch import Batch
from dgavg.errors import require
from dgavg.run import Run
from dgavg.trainer import Trainer, trainer
from dgavg.trainers.batch.partners import check_across, every_row, partners_of, probabilities


@trainer("cutmix", one_domain="across=false")
class CutMix(Trainer):
    """CutMix: pastes a box of another image and mixes labels (Yun et al. 2019, arXiv 1905.04899).

    With λ ~ Beta(alpha, alpha), a box of height H·√(1 − λ) and width W·√(1 − λ) about a pixel drawn
    evenly is cut out of image j and pasted into image i at the same place; what stands over the
    edge is lost. The label is s·yᵢ + (1 − s)·yⱼ, s the share of pixels that are i's in the end.
    One box a domain; the authors' code has one a batch. Their code also makes boxes of an even
    number of pixels, one less than the odd ones; here they are rounded to the nearest.
    Which image is j is as in mixup.

    - `alpha` (1; usual 0.1 to 1): 1 any λ alike, near 0 boxes of nearly all or nothing.
    - `p` (1; usual 0.5 to 1): the share of domains and steps that are cut at all. The paper has 1
      on ImageNet, 0.5 on CIFAR.
    - `across` (true): boxes come from another domain; false takes them from the same one.

    Cost: no pass, one more copy of the batch.

    Avoid: Where the object is small or the class is one of the whole image, a box may hold no
    object, and its label is then wrong.
    """

    alpha: float = 1.0
    p: float = 1.0
    across: bool = True

    @property
    def min_domains(self) -> int:  # type: ignore[override]  # of other links a constant
        """Two domains where rows are mixed across them."""
        return 2 if self.across else 1

    def validate(self) -> None:
        """Refuse settings out of range."""
        require(self.alpha > 0, f"trainer.cutmix.alpha={self.alpha}: a number above 0")
        require(0 <= self.p <= 1, f"trainer.cutmix.p={self.p}: a number from 0 to 1")

    def setup(self, run: Run) -> None:
        """Refuse inputs that are no images."""
        shape = tuple(run.batches(0).x.shape)
        require(
            len(shape) == 4,
            f"cutmix cuts boxes out of images (N, C, H, W): inputs of shape {shape} have none",
        )

    def prepare(self, run: Run, batch: Batch) -> Batch:
        """Paste the boxes; labels become probabilities (N, classes)."""
        batch = self.inner.prepare(run, batch)
        check_across("cutmix", self.across, batch.domains)
        random, (height, width) = run.random("cutmix"), batch.x.shape[-2:]
        partner = partners_of(random, batch, self.across)
        share = random.beta(self.alpha, self.alpha, batch.domains)
        share[random.random(batch.domains) >= self.p] = 1.0
        rows, columns = (
            intervals(random, length, np.sqrt(1.0 - share)) for length in (height, width)
        )
        area = (rows[1] - rows[0]) * (columns[1] - columns[0])
        kept = torch.from_numpy(1.0 - area / (height * width))
        box = (
            inside(rows, height, batch)[:, None, :, None]
            & (inside(columns, width, batch)[:, None, None, :])
        )
        labels = probabilities(batch, run.classes)
        mixed = torch.lerp(labels[partner], labels, every_row(kept, batch, 2).to(labels))
        return replace(batch, x=torch.where(box, batch.x[partner], batch.x), y=mixed)


def intervals(random: np.random.Generator, length: int, share: np.ndarray) -> np.ndarray:
    """First pixel, and first one after the end, of intervals about an evenly drawn pixel.

    `share` (domains,) is how much of `length` each covers if it stands over no edge; shape
    (2, domains).
    """
    size = np.rint(length * share).astype(np.int64)
    start = random.integers(length, size=len(size)) - size // 2
    edges: np.ndarray = np.clip(np.stack([start, start + size]), 0, length)
    return edges


def inside(interval: np.ndarray, length: int, batch: Batch) -> Tensor:
    """Which pixels of each row are in its domain's interval; shape (N, length)."""
    first, end = (every_row(torch.from_numpy(edge), batch, 2) for edge in interval)
    pixel = torch.arange(length, device=batch.x.device)
    return (pixel >= first) & (pixel < end)
