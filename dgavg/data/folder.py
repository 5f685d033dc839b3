"""The data set of a folder tree: root/domain/class/image, as PACS, VLCS and OfficeHome have it."""

from __future__ import annotations

import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

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
) -> DomainDataset:
    """Any folder tree root/domain/class/image, such as PACS or OfficeHome (3×size×size).

    Domains, classes and images are sorted by name, as torchvision's `ImageFolder` and so DomainBed
    sort them; names that begin with a dot and files that are no images are passed over. An image
    is made RGB and resized whole to `size` × `size` pixels (Pillow's bilinear, antialiased). All
    are held in memory: 3 · size² bytes each.

    `title` is what tables call it. `domains` keeps only these (null: every folder).
    `on_bad_image=skip` leaves images out that cannot be read and says so in the notes. `workers` is
    how many threads decode (0: one for each processor).

    Raises `UserError` where root, a domain, a class or an image is missing or cannot be read, or
    where the images do not fit into memory.
    """
    if on_bad_image not in ("error", "skip"):
        raise unknown("data.on_bad_image", on_bad_image, ("error", "skip"))
    require(size >= 1, f"data.size={size} must be at least 1 pixel")
    require(workers >= 0, f"data.workers={workers} must be 0 (one for each processor) or more")
    tree = _tree(Path(root).expanduser(), domains)
    classes = tuple(next(iter(tree.values())))
    loaded, bad = [], []
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        try:
            for domain, by_class in tree.items():
                part, left_out = _read(domain, by_class, size, on_bad_image == "skip", pool)
                loaded.append(part)
                bad += left_out
        except BaseException:
            pool.shutdown(cancel_futures=True)  # don't decode the rest first
            raise
    notes = (_note(bad, Path(root)),) if bad else ()
    return DomainDataset(title, tuple(loaded), classes, notes)


def _tree(root: Path, wanted: list[str] | None) -> Tree:
    """The image files of every domain and class, sorted by name; each domain has every class."""
    remedy = "set data.root=FOLDER to a tree FOLDER/domain/class/image"
    require(root.is_dir(), f"no folder {root}; {remedy}")
    found = _folders(root)
    require(bool(found), f"{root} has no folder for a domain in it; {remedy}")
    require(wanted != [], f"data.domains=[] keeps no domain; name at least 2 of {', '.join(found)}")
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
        domain: {label: _images(root / domain / label) for label in classes_of[domain]}
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


def _images(path: Path) -> list[Path]:
    names = sorted(
        entry.name
        for entry in os.scandir(path)
        if entry.name.lower().endswith(EXTENSIONS)
        and not entry.name.startswith(".")
        and entry.is_file()
    )
    return [path / name for name in names]


def _read(
    domain: str, by_class: dict[str, list[Path]], size: int, skip: bool, pool: ThreadPoolExecutor
) -> tuple[Domain, list[Path]]:
    """Decode one domain straight into its tensor; the files that could not be read apart."""
    paths = [path for files in by_class.values() for path in files]
    labels = torch.tensor([i for i, files in enumerate(by_class.values()) for _ in files])
    try:
        images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    except RuntimeError as error:
        need = len(paths) * 3 * size**2 / 2**30
        raise UserError(
            f"{len(paths)} images of domain {domain!r} at data.size={size} need {need:.1f} GiB, "
            "more memory than there is; choose a smaller data.size"
        ) from error
    problems = pool.map(lambda path, out: _decode(path, out, size), paths, images.numpy())
    good, bad = [], []
    for i, problem in enumerate(problems):
        if problem is None:
            good.append(i)
            continue
        require(
            skip, f"{paths[i]} cannot be read ({problem}); mend it or set data.on_bad_image=skip"
        )
        bad.append(paths[i])
    if bad:
        keep = torch.tensor(good, dtype=torch.int64)
        images, labels = images[keep], labels[keep]
        for index, (label, files) in enumerate(by_class.items()):
            require(
                bool((labels == index).any()),
                f"none of the {len(files)} images of class {label!r} of domain {domain!r} can be "
                f"read, so nothing is left of it; mend {files[0].parent}",
            )
    return Domain(domain, images, labels), bad


def _decode(path: Path, out: np.ndarray, size: int) -> str | None:
    """Read one image into `out` uint8 (3, size, size); why it could not be, or None."""
    try:
        with Image.open(path) as image:
            pixels = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    except Exception as error:  # Pillow's decoders raise many kinds for a broken file
        return str(error).split("\n")[0] or type(error).__name__
    out[:] = np.asarray(pixels).transpose(2, 0, 1)
    return None


def _note(bad: list[Path], root: Path) -> str:
    counts: dict[str, int] = defaultdict(int)
    for path in bad:
        counts[path.parent.parent.name] += 1
    each = ", ".join(f"{domain} {n}" for domain, n in counts.items())
    shown = [str(path.relative_to(root.expanduser())) for path in bad[:SHOWN]]
    more = [f"{len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
    return f"left out {len(bad)} unreadable image(s) ({each}): {', '.join(shown + more)}"
