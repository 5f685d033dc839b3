"""Domain and DomainDataset: what a multi-domain data set is."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dgavg.data.memory import floats
from dgavg.errors import require, unknown

if TYPE_CHECKING:  # splits know data sets, not the other way round
    from dgavg.data.splits import Splits


FEATURES = (torch.float16, torch.float32)


@dataclass(frozen=True, eq=False)
class Domain:
    """One named domain, whole: in memory, or mapped from a file.

    Shapes: `images` uint8 (N, C, H, W), 0..255, or features, float16 or float32 (N, F, 1, 1);
    `labels` int64 (N,), indices into the classes of the data set. `files`, where there are any,
    says where each image comes from: paths below the root of the data set, with "/" between.
    """

    name: str
    images: Tensor
    labels: Tensor
    files: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, eq=False)
class DomainDataset:
    """Domains that share their classes and their image shape.

    The index of a domain is its place in `domains`; splits and folds go by it. `notes` says what a
    user should know about this load, such as files that were left out. `official` are published
    lists of what is trained on. `content` is what `fingerprint()` gives, where it is known already:
    who changes domains or classes sets it to None.

    Raises `UserError` for fewer than two domains, a name twice, an empty domain, images that are
    not uint8 (N, C, H, W) or finite features, float16 or float32 (N, F, 1, 1), of one kind and the
    same (C, H, W) everywhere, labels that are not one int64 in 0..classes - 1 for each image, and
    files that are not one for each image.
    """

    name: str
    domains: tuple[Domain, ...]
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()
    official: Splits | None = None
    content: str | None = None

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
        features = images.dtype in FEATURES and images.ndim == 4 and images.shape[2:] == (1, 1)
        require(
            features or (images.dtype == torch.uint8 and images.ndim == 4),
            f"{where} has images of {images.dtype} {tuple(images.shape)}; give uint8 (N, C, H, W), "
            "or features, float16 or float32 (N, F, 1, 1)",
        )
        require(len(images) > 0, f"{where} has no image; give at least one or leave it out")
        first = self.domains[0]
        require(
            images.dtype == first.images.dtype,
            f"{where} has {images.dtype}, but {first.name!r} has {first.images.dtype}; "
            "give one kind everywhere",
        )
        require(
            not features or bool(images.isfinite().all()),
            f"{where} has features that are not finite; mend them or leave those rows out",
        )
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
        require(
            domain.files is None or len(domain.files) == len(images),
            f"{where} names {len(domain.files or ())} files for {len(images)} images; name each",
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

    def fingerprint(self) -> str:
        """A hash of the content: names, images and labels, wherever their files are."""
        if self.content is not None:
            return self.content
        found = hashlib.blake2b(repr((self.names, self.classes)).encode(), digest_size=8)
        for domain in self.domains:
            for tensor in (domain.images, domain.labels):
                found.update(repr(tuple(tensor.shape)).encode())
                found.update(tensor.cpu().contiguous().numpy().data)
        return found.hexdigest()


def as_floats(images: Tensor) -> Tensor:
    """What a model takes, float32: uint8 0..255 → [0, 1]; features as they are."""
    if images.dtype == torch.uint8:
        return floats(images.shape, images.device).copy_(images).div_(255)
    return images.to(torch.float32)
