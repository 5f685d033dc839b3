"""Hugging Face data sets with a column for images, one for labels and one for domains."""

from __future__ import annotations

import importlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dgavg.data.decode import decode, threaded
from dgavg.data.domains import Domain, DomainDataset
from dgavg.data.registry import dataset
from dgavg.errors import UserError, require, unknown

SAVED = ("dataset_info.json", "dataset_dict.json")  # what save_to_disk leaves in a folder
SHOWN = 5  # numbers of rows written out in a note


@dataset("hub")
def hub(
    *,
    dataset: str,
    config_name: str | None = None,
    split: str = "train",
    image: str = "image",
    label: str = "label",
    domain: str = "domain",
    size: int = 224,
    title: str | None = None,
    on_bad_image: str = "error",
    workers: int = 0,
) -> DomainDataset:
    """Any Hugging Face data set with image, label and domain columns (3×size×size).

    `dataset` is its name on the Hub, or a folder that `save_to_disk` wrote or that `load_dataset`
    takes; `config_name` and `split` choose a part of it. `image`, `label` and `domain` are its
    columns; labels and domains are class labels, texts or integers, and those that are class labels
    keep their order, others are sorted. Images are made RGB, resized whole to `size` × `size`
    pixels (Pillow's bilinear, antialiased) and held in memory. Needs the package `datasets`.

    Source of the library: Lhoest et al. 2021 (arXiv 2109.02846).

    Raises `UserError` where the package, the data set, its split or a column is not there, and for
    an image that can't be read, unless `on_bad_image=skip` leaves it out.
    """
    if on_bad_image not in ("error", "skip"):
        raise unknown("data.on_bad_image", on_bad_image, ("error", "skip"))
    require(size >= 1, f"data.size={size} must be at least 1 pixel")
    require(workers >= 0, f"data.workers={workers} must be 0 (one for each processor) or more")
    rows = _open(dataset, config_name, split)
    for kind, column in (("image", image), ("label", label), ("domain", domain)):
        if column not in rows.column_names:
            raise unknown("column", column, rows.column_names, f"{dataset} (data.{kind})")
    y, classes = _numbered(rows, label, "label")
    d, domains = _numbered(rows, domain, "domain")
    pixels, bad = _images(rows, image, size, on_bad_image == "skip", workers, dataset)
    kept = np.ones(len(rows), bool)
    kept[bad] = False
    parts = []
    for i, name in enumerate(domains):
        keys = np.flatnonzero((d == i) & kept)
        require(len(keys) > 0, f"{dataset}: no image of domain {name!r} can be read; mend it")
        parts.append(Domain(name, torch.from_numpy(pixels[keys]), torch.from_numpy(y[keys])))
    shown = ", ".join(
        [*map(str, bad[:SHOWN]), *([f"{len(bad) - SHOWN} more"] if bad[SHOWN:] else [])]
    )
    notes = (f"left out {len(bad)} unreadable image(s), row(s) {shown}",) if bad else ()
    return DomainDataset(title or Path(dataset).name, tuple(parts), classes, notes)


def _open(name: str, config_name: str | None, split: str) -> Any:
    """The rows of one split."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise UserError("data=hub needs the package datasets: pip install 'dgavg[hub]'") from error
    folder = Path(name).expanduser()
    try:
        if any((folder / name).is_file() for name in SAVED):
            found = datasets.load_from_disk(str(folder))
            if not isinstance(found, datasets.DatasetDict):
                return found
            if split not in found:
                raise unknown("split", split, found, f"{folder} (data.split)")
            return found[split]
        return datasets.load_dataset(name, config_name, split=split)
    except UserError:
        raise
    except Exception as error:  # the network, the Hub, damaged files: datasets raises many kinds
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"data set {name!r} (split {split!r}) can't be opened ({reason}); set data.dataset to "
            "a name on the Hugging Face Hub or to a folder that save_to_disk wrote"
        ) from error


def _numbered(rows: Any, column: str, kind: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """A column as places in its names; of a class label's names those of domains that occur."""
    values, feature = list(rows[column]), rows.features[column]
    texts = all(isinstance(v, str) for v in values)
    numbers = all(isinstance(v, int) and not isinstance(v, bool) for v in values)
    require(
        bool(values) and (texts or numbers),
        f"column {column!r} holds something else than texts or integers in each row; choose "
        f"another data.{kind}",
    )
    present = sorted(set(values))
    names = getattr(feature, "names", None)  # of a class label
    if names is None:
        known, titles = present, tuple(map(str, present))
    else:
        require(
            numbers and present[0] >= 0,
            f"column {column!r} has rows without a {kind} (-1); leave them out of the data set",
        )
        known = list(range(len(names))) if kind == "label" else present
        titles = tuple(str(names[v]) for v in known)
    place = {value: i for i, value in enumerate(known)}
    return np.array([place[v] for v in values], np.int64), titles


def _images(
    rows: Any, column: str, size: int, skip: bool, workers: int, name: str
) -> tuple[np.ndarray, Sequence[int]]:
    """All images uint8 (N, 3, size, size), and the numbers of those that can't be read."""
    kind = importlib.import_module("datasets").Image
    require(
        isinstance(rows.features[column], kind),
        f"column {column!r} of {name} is no column of images; choose another data.image",
    )
    encoded = rows.select_columns([column]).cast_column(column, kind(decode=False))
    try:
        pixels = np.zeros((len(rows), 3, size, size), np.uint8)
    except MemoryError as error:
        raise UserError(
            f"{len(rows)} images of {name} at data.size={size} don't fit into memory; choose a "
            "smaller data.size"
        ) from error

    def one(i: int) -> str | None:
        cell = encoded[i][column] or {}
        if not cell.get("bytes") and not cell.get("path"):
            return "no image in this row"
        source = io.BytesIO(cell["bytes"]) if cell.get("bytes") else Path(cell["path"])
        return decode(source, pixels[i])  # type: ignore[arg-type]

    bad = []
    for i, problem in enumerate(threaded(one, range(len(rows)), workers, "decoding images")):
        if problem is not None:
            require(
                skip,
                f"row {i} of {name}: the image cannot be read ({problem}); mend it or set "
                "data.on_bad_image=skip",
            )
            bad.append(i)
    return pixels, bad
