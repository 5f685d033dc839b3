"""The data set of a folder tree: root/domain/class/image, as PACS, VLCS and OfficeHome have it."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dgavg.data.cache import FOLDER, CannotBuildError, cached_images
from dgavg.data.decode import Bad, decode_all, unreadable
from dgavg.data.domains import Domain, DomainDataset
from dgavg.data.registry import dataset
from dgavg.errors import UserError, require, unknown

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""What torchvision's `ImageFolder` takes for an image; upper or lower case."""

SHOWN = 5  # names of files written out in a note

Tree = dict[str, dict[str, list[Path]]]  # domain → class → images


@dataset("folder")
def folder(
    *,
    root: str,
    size: int = 64,
    domains: list[str] | None = None,
    on_bad_image: str = "error",
    title: str = "folder",
    workers: int = 0,
    cache: str | None = None,
) -> DomainDataset:
    """Any folder tree root/domain/class/image, such as PACS or OfficeHome (3×size×size).

    Domains, classes and images are sorted by name, as torchvision's `ImageFolder` and so DomainBed
    sort them; names that begin with a dot and files that are no images are passed over. An image
    is made RGB and resized whole to `size` × `size` pixels (Pillow's bilinear, antialiased).

    `title` is what tables call it. `domains` keeps only these (null: every folder).
    `on_bad_image=skip` leaves images out that cannot be read and says so in the notes. `workers` is
    how many threads decode (0: one for each processor). `cache` is the folder for the decoded
    images, 3 · size² bytes each, which all runs share: null is `.dgavg-cache` in the root, `none`
    holds them in memory instead.

    Raises `UserError` where root, a domain, a class or an image is missing or cannot be read, or
    where the images fit neither on the disk nor into memory.
    """
    check_image_settings(size, on_bad_image, workers)
    place = Path(root).expanduser()
    return load_files(
        find_tree(place, domains),
        place,
        size=size,
        on_bad_image=on_bad_image,
        workers=workers,
        cache=cache,
        title=title,
    )


def load_files(
    tree: Tree,
    root: Path,
    *,
    size: int,
    on_bad_image: str = "error",
    workers: int = 0,
    cache: str | None = None,
    title: str = "folder",
    notes: Sequence[str] = (),
) -> DomainDataset:
    """Read any images below `root`, named by domain and class, through the cache.

    Every domain has the same classes in the same order; settings as those of `folder`.
    """
    check_image_settings(size, on_bad_image, workers)
    skip, source = on_bad_image == "skip", _Source(tree, root, title)
    if cache != "none":
        names = {
            domain: {label: [source.name(path) for path in files] for label, files in part.items()}
            for domain, part in tree.items()
        }
        try:
            stored = cached_images(
                Path(cache).expanduser() if cache else root / FOLDER,
                root,
                names,
                size,
                skip=skip,
                workers=workers,
                fingerprint=lambda images, bad: source.dataset(images, bad).fingerprint(),
            )
        except CannotBuildError as error:
            remedy = "set data.cache=FOLDER to one that can, or data.cache=none"
            require(cache is None, f"decoded images can't be kept in {cache} ({error}); {remedy}")
            notes = (*notes, f"decoded into memory: {root / FOLDER} can't be written ({error})")
        else:
            if stored.bad and not skip:
                raise UserError(unreadable(source.paths[stored.bad[0][0]], stored.bad[0][1]))
            return source.dataset(stored.images, stored.bad, notes, stored.content)
    images, bad = _in_memory(source.paths, size, skip, workers)
    return source.dataset(images, bad, notes)


def check_image_settings(size: int, on_bad_image: str, workers: int) -> None:
    """Raise `UserError` for a setting of `folder` that can't be."""
    if on_bad_image not in ("error", "skip"):
        raise unknown("data.on_bad_image", on_bad_image, ("error", "skip"))
    require(size >= 1, f"data.size={size} must be at least 1 pixel")
    require(workers >= 0, f"data.workers={workers} must be 0 (one for each processor) or more")


def find_tree(root: Path, wanted: Sequence[str] | None = None) -> Tree:
    """The image files of every domain and class, sorted by name; each domain has every class.

    `wanted` keeps only these domains. Raises `UserError` where a domain, a class or all images of
    one are missing.
    """
    remedy = "set data.root=FOLDER to a tree FOLDER/domain/class/image"
    require(root.is_dir(), f"no folder {root}; {remedy}")
    found = _folders(root)
    require(bool(found), f"{root} has no folder for a domain in it; {remedy}")
    require(
        wanted is None or len(wanted) > 0,
        f"data.domains=[] keeps no domain; name at least 2 of {', '.join(found)}",
    )
    for name in wanted or ():
        if name not in found:
            raise unknown("domain", name, found, str(root))
    classes_of = {domain: _folders(root / domain) for domain in found}
    domains = found if wanted is None else sorted(set(wanted))
    whole = ",".join(domain for domain in found if classes_of[domain])
    for domain in domains:
        hint = f"write data.domains=[{whole}]" if whole else remedy
        require(
            bool(classes_of[domain]), f"{root / domain} has no folder for a class in it; {hint}"
        )
    tree = {
        domain: {label: images_in(root / domain / label) for label in classes_of[domain]}
        for domain in domains
    }
    every = sorted({label for by_class in tree.values() for label in by_class})
    for domain, by_class in tree.items():
        for label in every:
            require(
                bool(by_class.get(label)),
                f"domain {domain!r} has no image of class {label!r} in {root / domain / label}; "
                "add one, remove the class from every domain, or leave the domain out with "
                "data.domains=[...]",
            )
    return tree


def _folders(path: Path) -> list[str]:
    return sorted(e.name for e in os.scandir(path) if e.is_dir() and not e.name.startswith("."))


def images_in(path: Path) -> list[Path]:
    """The image files of a folder, sorted by name."""
    names = sorted(
        entry.name
        for entry in os.scandir(path)
        if entry.name.lower().endswith(EXTENSIONS)
        and not entry.name.startswith(".")
        and entry.is_file()
    )
    return [path / name for name in names]


def _in_memory(
    paths: Sequence[Path], size: int, skip: bool, workers: int
) -> tuple[Tensor, list[Bad]]:
    try:
        images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    except RuntimeError as error:
        need = len(paths) * 3 * size**2 / 2**30
        raise UserError(
            f"{len(paths)} images at data.size={size} need {need:.1f} GiB, more memory than there "
            "is; choose a smaller data.size"
        ) from error
    pixels = images.numpy()
    bad = decode_all(paths, size, pixels.__setitem__, skip=skip, workers=workers)
    left_out = {i for i, _ in bad}
    keep = [i for i in range(len(paths)) if i not in left_out]
    return (images[torch.tensor(keep, dtype=torch.int64)] if bad else images), bad


class _Source:
    """The files of a tree in a row, and the data set that their images make."""

    def __init__(self, tree: Tree, root: Path, title: str) -> None:
        self.tree, self.root, self.title = tree, root, title
        self.paths = [p for part in tree.values() for files in part.values() for p in files]

    def name(self, path: Path) -> str:
        """Where a file lies below the root, with "/" between."""
        return path.relative_to(self.root).as_posix()

    def dataset(
        self,
        images: Tensor,
        bad: Sequence[Bad],
        notes: Sequence[str] = (),
        content: str | None = None,
    ) -> DomainDataset:
        """`images` are those of all files but the bad ones, in order."""
        left_out = {i for i, _ in bad}
        domains, start, first = [], 0, 0
        for domain, part in self.tree.items():
            labels, files = [], []
            for label, (name, paths) in enumerate(part.items()):
                good = [p for i, p in enumerate(paths, start) if i not in left_out]
                start += len(paths)
                require(
                    bool(good),
                    f"none of the {len(paths)} images of class {name!r} of domain {domain!r} can "
                    f"be read, so nothing is left of it; mend {paths[0].parent}",
                )
                labels += [label] * len(good)
                files += [self.name(path) for path in good]
            rows = slice(first, first := first + len(labels))
            domains.append(Domain(domain, images[rows], torch.tensor(labels), tuple(files)))
        classes = tuple(next(iter(self.tree.values())))
        if bad:
            notes = (*notes, self._note(sorted(left_out)))
        return DomainDataset(self.title, tuple(domains), classes, tuple(notes), content=content)

    def _note(self, bad: Sequence[int]) -> str:
        counts: dict[str, int] = defaultdict(int)
        owner = [d for d, part in self.tree.items() for files in part.values() for _ in files]
        for i in bad:
            counts[owner[i]] += 1
        each = ", ".join(f"{domain} {n}" for domain, n in counts.items())
        shown = [self.name(self.paths[i]) for i in bad[:SHOWN]]
        more = [f"{len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
        return f"left out {len(bad)} unreadable image(s) ({each}): {', '.join(shown + more)}"
