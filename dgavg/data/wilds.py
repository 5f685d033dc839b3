"""Data sets of WILDS whose domains are in their metadata, through the package wilds."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from contextlib import redirect_stdout
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from dgavg.data.domains import Domain, DomainDataset
from dgavg.data.folder import check_image_settings, load_files
from dgavg.data.registry import dataset
from dgavg.data.sources import data_root
from dgavg.errors import UserError, require

COUNTS = {"camelyon17": 455954, "fmow": 141696}  # images, as they were counted elsewhere
PAGE = "https://wilds.stanford.edu/downloads"


@dataset("camelyon17")
def camelyon17(
    *,
    root: str | None = None,
    size: int = 224,
    download: bool = False,
    on_bad_image: str = "error",
    workers: int = 0,
    cache: str | None = None,
) -> DomainDataset:
    """WILDS Camelyon17: tumor in tissue, five hospitals (455,954 images of 96×96, 2 classes).

    `root` is the folder that has `camelyon17_v1.0` in it (null: $DGAVG_DATA, then `data`);
    `download` fetches it (10 GB). All images of a hospital are one domain, in the order of the
    metadata, whatever WILDS uses them for. Other settings: see `folder`. Needs the package `wilds`.

    Source: Bandi et al. 2018 (IEEE TMI), as in WILDS, Koh et al. 2021 (arXiv 2012.07421).

    Raises `UserError` where the package or the data are not there.
    """
    found = _open("camelyon17", "Camelyon17Dataset", root, download)
    base = Path(found.data_dir)
    paths = [base / name for name in found._input_array]
    return _load(
        found,
        "hospital",
        paths,
        ("normal", "tumor"),
        size=size,
        on_bad_image=on_bad_image,
        workers=workers,
        cache=cache,
    )


@dataset("fmow")
def fmow(
    *,
    root: str | None = None,
    size: int = 224,
    download: bool = False,
    on_bad_image: str = "error",
    workers: int = 0,
    cache: str | None = None,
) -> DomainDataset:
    """WILDS FMoW: how land is used, from satellites, six regions (141,696 images, 62 classes).

    `root` is the folder that has `fmow_v1.1` in it; `download` fetches it (50 GB). Domains are the
    regions, in the order of WILDS' numbers (DomainBed's region_0 to region_5). Not every region has
    every class. Other settings: see `camelyon17`.

    Source: Christie et al. 2018 (arXiv 1711.07846), as in WILDS, Koh et al. 2021
    (arXiv 2012.07421).

    Raises `UserError` where the package or the data are not there.
    """
    found = _open("fmow", "FMoWDataset", root, download)
    base = Path(found.data_dir)
    paths = [base / "images" / f"rgb_img_{i}.png" for i in found.full_idxs]
    return _load(
        found,
        "region",
        paths,
        tuple(importlib.import_module(type(found).__module__).categories),
        size=size,
        on_bad_image=on_bad_image,
        workers=workers,
        cache=cache,
    )


def _open(name: str, kind: str, root: str | None, download: bool) -> Any:
    """The data set as wilds knows it."""
    os.environ.setdefault("OUTDATED_IGNORE", "1")  # what it imports asks PyPI for newer versions
    try:
        module = importlib.import_module(f"wilds.datasets.{name}_dataset")
    except ImportError as error:
        raise UserError(
            f"data={name} needs the package wilds ({error}): pip install 'dgavg[wilds]'"
        ) from error
    made, base = getattr(module, kind), data_root(root)
    version = f"{name}_v{max(made._versions_dict)}"
    by_hand = f"get it by hand ({PAGE}) and set data.root=FOLDER to the folder with {version}/"
    require(
        download or (base / version).is_dir(),
        f"no {version} in {base}; set data.download=true to fetch it, or {by_hand}",
    )
    try:
        # It warns about groups that nobody reads here, and prints how a download goes.
        with warnings.catch_warnings(action="ignore"), redirect_stdout(sys.stderr):
            return made(root_dir=str(base), download=download)
    except Exception as error:  # the network, archives, metadata: the remedy is the same
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"{version} in {base} can't be opened ({reason}); {by_hand}") from error


def _load(
    found: Any, field: str, paths: list[Path], classes: tuple[str, ...], **settings: Any
) -> DomainDataset:
    """One domain for each value of a metadata field, each in the order of the metadata."""
    check_image_settings(settings["size"], settings["on_bad_image"], settings["workers"])
    values = found.metadata_array[:, found.metadata_fields.index(field)]
    names = (found.metadata_map or {}).get(field)
    root = Path(found.data_dir)
    tree: dict[str, dict[str, list[Path]]] = {}
    for value in values.unique().tolist():  # sorted
        rows = torch.nonzero(values == value)[:, 0].tolist()
        name = str(names[value]) if names is not None else f"{field}_{value}"
        tree[name] = {"all": [paths[i] for i in rows]}
    count = COUNTS[found.dataset_name]
    differs = f"{found.dataset_name} in {root} has {len(paths)} images, where {count} are usual"
    notes = () if len(paths) == count else (differs,)
    data = load_files(tree, root, title=found.dataset_name, notes=notes, **settings)
    label_of = {
        path.relative_to(root).as_posix(): label
        for path, label in zip(paths, found.y_array.tolist(), strict=True)
    }
    digest = blake2b(f"{data.fingerprint()} {classes}".encode(), digest_size=8)
    domains = []
    for domain in data.domains:
        labels = torch.tensor([label_of[name] for name in domain.files or ()])
        digest.update(labels.numpy().tobytes())
        domains.append(Domain(domain.name, domain.images, labels, domain.files))
    return DomainDataset(data.name, tuple(domains), classes, data.notes, content=digest.hexdigest())
