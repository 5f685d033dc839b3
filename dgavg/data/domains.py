"""Domain and DomainDataset: what a multi-domain data set is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dgavg.errors import require, unknown


@dataclass(frozen=True, eq=False)
class Domain:
    """One named domain, whole and in memory.

    Shapes: `images` uint8 (N, C, H, W), 0..255; `labels` int64 (N,), indices into the classes of
    the data set.
    """

    name: str
    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, eq=False)
class DomainDataset:
    """Domains that share their classes and their image shape.

    The index of a domain is its place in `domains`; splits and folds go by it. `notes` says what a
    user should know about this load, such as files that were left out.

    Raises `UserError` for fewer than two domains, a name twice, an empty domain, images that are
    not uint8 (N, C, H, W) with the same (C, H, W) everywhere, and labels that are not one int64 in
    0..classes - 1 for each image.
    """

    name: str
    domains: tuple[Domain, ...]
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        where = f"data set {self.name!r}"
        require(
            len(self.domains) >= 2,
            f"{where} has {len(self.domains)} domain(s) ({', '.join(self.names) or 'none'}), but "
            "one is held out and the rest are trained on: give at least 2",
        )
        for kind, names in (("domain", self.names), ("class", self.classes)):
            twice = next((n for i, n in enumerate(names) if n in names[:i]), None)
            require(twice is None, f"{where} names {kind} {twice!r} twice; name each once")
        for domain in self.domains:
            self._check(domain, f"domain {domain.name!r} of {where}")

    def _check(self, domain: Domain, where: str) -> None:
        images, labels = domain.images, domain.labels
        require(
            images.dtype == torch.uint8 and images.ndim == 4,
            f"{where} has images of {images.dtype} {tuple(images.shape)}; give uint8 (N, C, H, W)",
        )
        require(len(images) > 0, f"{where} has no image; give at least one or leave it out")
        require(
            tuple(images.shape[1:]) == self.input_shape,
            f"{where} has images of shape {tuple(images.shape[1:])}, but {self.domains[0].name!r} "
            f"has {self.input_shape}; resize them to one shape",
        )
        require(
            labels.dtype == torch.int64 and labels.shape == images.shape[:1],
            f"{where} has labels of {labels.dtype} {tuple(labels.shape)} for {len(images)} images; "
            f"give int64 ({len(images)},)",
        )
        low, high, last = int(labels.min()), int(labels.max()), len(self.classes) - 1
        require(
            low >= 0 and high <= last,
            f"{where} has labels {low}..{high}, but {len(self.classes)} classes need 0..{last}",
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The domain names, in index order."""
        return tuple(domain.name for domain in self.domains)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        channels, height, width = self.domains[0].images.shape[1:]
        return channels, height, width

    def index(self, name: str) -> int:
        """The index of the domain called `name`; `UserError` with the known ones if none."""
        if name not in self.names:
            raise unknown("domain", name, self.names, f"data set {self.name!r}")
        return self.names.index(name)
