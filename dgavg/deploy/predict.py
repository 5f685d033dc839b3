"""Predictions for new images: one row of a CSV file each, from one run or an ensemble."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from dgavg.benchmark.fold import threads_for
from dgavg.data.decode import shown
from dgavg.deploy.images import Decoded, check_shape, decoded, image_files
from dgavg.deploy.saved import Saved
from dgavg.disk import write_atomically
from dgavg.errors import UserError, require, unknown
from dgavg.run import autocast

Rows = list[tuple[Path, np.ndarray]]


@dataclass
class Predicted:
    """What was done: images scored, those that could not be read and why, and a check.

    `labelled` images lie in a folder named like a class, the nearest one counts; `right` of them
    were predicted to be of it.
    """

    scored: int = 0
    labelled: int = 0
    right: int = 0
    bad: list[tuple[Path, str]] = field(default_factory=list)


def predict(
    runs: Sequence[Saved],
    place: Path | str,
    out: Path | str,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    on_bad_image: str = "skip",
    title: str = "",
) -> Predicted:
    """Score the images in a folder, or one image; write `out`, a CSV, whole or not at all.

    Its columns are `file` (as seen from the folder), `class` and the probability of each class: of
    several runs, the mean of theirs. Images are made what the runs were trained on: RGB or grey,
    resized whole to the input shape. Memory holds a few batches of images, however many there are.

    A model whose predictions depend on the batch reads as many images at once as it was evaluated
    with, in the order of the files. `on_bad_image` is `skip` (left out, listed in the result) or
    `error`. With a `title` a bar on standard error shows how far it is, where that is a terminal.

    Raises `UserError` for runs that differ in classes or input shape, for inputs that no image
    file can be, where no image can be read, and where `out` can't be written.
    """
    runs, place, out, device = list(runs), Path(place), Path(out), torch.device(device)
    if on_bad_image not in ("skip", "error"):
        raise unknown("on_bad_image", on_bad_image, ("skip", "error"))
    require(batch_size >= 1, f"batch size {batch_size}: at least 1")
    _check_alike(runs)
    require(out.parent.is_dir(), f"no folder {out.parent} to write {out.name} in")
    require(not out.is_dir(), f"{out} is a folder; name a file for the predictions")
    files = image_files(place)
    paths = [place] if place.is_file() else [place / file for file in files]
    found = Predicted()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(max(threads_for(run.model) for run in runs))
        for run in runs:
            run.model.to(device)

        def write(file: BinaryIO) -> None:
            text = io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="")
            table = csv.writer(text, lineterminator="\n")
            table.writerow(["file", "class", *runs[0].classes])
            size = _batch_size(runs, batch_size)
            images = decoded(paths, runs[0].input_shape, ahead=2 * size)
            watched = zip(files, shown(images, len(files), title), strict=True)
            for rows in _batches(watched, size, found, on_bad_image == "skip"):
                table.writerows(_scored(runs, rows, device, found))
            if not found.scored:
                first, why = found.bad[0]
                raise UserError(f"none of {len(files)} images can be read; {first}: {why}")
            text.flush()
            text.detach()

        write_atomically(out, write, "choose another --out")
    finally:
        torch.set_num_threads(threads)
    return found


def _check_alike(runs: Sequence[Saved]) -> None:
    require(bool(runs), "no run to predict with")
    first = runs[0]
    check_shape(first.input_shape)
    for run in runs:
        for what, mine, theirs in (
            ("classes", run.classes, first.classes),
            ("input shape", run.input_shape, first.input_shape),
        ):
            require(
                mine == theirs,
                f"{run.folder} and {first.folder} differ in {what} ({_listed(mine)} there, "
                f"{_listed(theirs)} here): runs of an ensemble share classes and input shape",
            )


def _listed(values: Sequence[Any], shown: int = 5) -> str:
    more = f" and {len(values) - shown} more" if len(values) > shown else ""
    return ", ".join(map(str, values[:shown])) + more


def _batch_size(runs: Sequence[Saved], wanted: int) -> int:
    """Whole contexts of models that have them, so that where batches end makes no difference."""
    context = math.lcm(*(run.support or 1 for run in runs))
    return -(-wanted // context) * context


def _batches(
    images: Iterable[tuple[Path, Decoded]], size: int, found: Predicted, skip: bool
) -> Iterator[Rows]:
    """The images that can be read, so many at a time; the others are noted in `found`."""
    rows: Rows = []
    for file, image in images:
        if isinstance(image, str):
            hint = "mend it or write --on-bad-image skip"
            require(skip, f"{file} cannot be read ({image}); {hint}")
            found.bad.append((file, image))
            continue
        rows.append((file, image))
        if len(rows) == size:
            yield rows
            rows = []
    if rows:
        yield rows


def _scored(
    runs: Sequence[Saved], rows: Rows, device: torch.device, found: Predicted
) -> Iterator[list[str]]:
    """The lines of the CSV for a batch."""
    classes = runs[0].classes
    images = torch.from_numpy(np.stack([image for _, image in rows]))
    chances = probabilities(runs, images.to(device).float().div_(255)).cpu()
    for (file, _), best, chance in zip(
        rows, chances.argmax(dim=1).tolist(), chances.tolist(), strict=True
    ):
        label = next((part for part in file.parts[-2::-1] if part in classes), None)
        found.scored += 1
        found.labelled += label is not None
        found.right += label == classes[best]
        yield [file.as_posix(), classes[best], *(f"{p:.6f}" for p in chance)]


@torch.no_grad()
def probabilities(runs: Sequence[Saved], images: Tensor) -> Tensor:
    """Images (N, C, H, W) in [0, 1] to the mean of the runs' probabilities (N, classes)."""
    total = torch.zeros(len(images), len(runs[0].classes), device=images.device)
    for run in runs:
        parts = torch.split(images, run.support or len(images))
        with autocast(run.config["precision"], images.device):
            logits = [run.model(part).float() for part in parts]
        total += torch.cat(logits).softmax(dim=1)
    return total / len(runs)
