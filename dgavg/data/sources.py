"""Where digit images come from: MNIST's idx files, `.npz` files and scikit-learn, in one form.

Every function gives images uint8 (N, C, H, W) and labels int64 (N,), in the order of the source.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dgavg.data.idx import read_idx
from dgavg.errors import UserError, require

PLACES = ("", "digits", "MNIST/raw")
"""Folders inside the data folder that are searched for a file."""


def data_root(root: str | None) -> Path:
    """The data folder: `root`, or else the environment's DGAVG_DATA, or else `data`."""
    return Path(root or os.environ.get("DGAVG_DATA") or "data").expanduser()


def locate(root: Path, names: tuple[str, ...], remedy: str) -> Path:
    """The first of the files `names` in any of `PLACES` of `root`.

    Raises `UserError` that ends in `remedy` if none is there.
    """
    for place in PLACES:
        for name in names:
            if (root / place / name).is_file():
                return root / place / name
    inside = ", ".join(f"{place}/" for place in PLACES if place)
    raise UserError(f"no {' or '.join(names)} in {root} (nor in its {inside}); {remedy}")


def mnist(root: str | None, download: bool) -> tuple[Tensor, Tensor]:
    """All of MNIST (LeCun et al. 1998), the training file and then the test file: 1×28×28.

    With `download`, files that are missing are fetched into `root`/MNIST/raw first. Raises
    `UserError` for a file that is missing, damaged or does not fit its partner, and for a download
    that fails.
    """
    folder = data_root(root)
    remedy = "set data.root=FOLDER to the folder with the MNIST files, or data.download=true"
    stems = [
        f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
    ]
    names = [(f"{stem}-ubyte", f"{stem}-ubyte.gz") for stem in stems]
    try:
        paths = [locate(folder, name, remedy) for name in names]
    except UserError:
        if not download:
            raise
        _download_mnist(folder)
        paths = [locate(folder, name, remedy) for name in names]
    images, labels = [], []
    for image_path, label_path in zip(paths[::2], paths[1::2], strict=True):
        pixels, digits = read_idx(image_path, 3), read_idx(label_path, 1)
        require(
            pixels.shape[1:] == (28, 28),
            f"{image_path} holds images of {tuple(pixels.shape[1:])}, not 28×28; give MNIST's file",
        )
        _check_labels(digits, len(pixels), f"{label_path} (for {image_path.name})")
        images.append(pixels[:, None])
        labels.append(digits.long())
    return torch.cat(images), torch.cat(labels)


def _download_mnist(folder: Path) -> None:
    from torchvision.datasets import MNIST

    try:
        MNIST(str(folder), download=True)
    except Exception as error:  # urllib, sockets, the disk: any of them, the remedy is the same
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"MNIST could not be downloaded to {folder} ({reason}); put its four idx files there "
            "by hand, or set data.root=FOLDER to a folder that has them"
        ) from error


def npz(root: str | None, name: str, size: int, channels: int) -> tuple[Tensor, Tensor]:
    """Images and labels of an `.npz` file with `x` uint8 (N, size, size[, 3]) and `y` (N,) in 0..9.

    Raises `UserError` for a file that is missing, cannot be read or has other arrays in it.
    """
    shape = (size, size, 3)[: 3 if channels == 3 else 2]
    form = f"x uint8 (N, {', '.join(map(str, shape))}) and y (N,), digits 0..9"
    remedy = f"set data.root=FOLDER to the folder with {name} ({form})"
    path = locate(data_root(root), (name,), remedy)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            missing = [key for key in ("x", "y") if key not in arrays]
            x, y = (None, None) if missing else (arrays["x"], arrays["y"])
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} cannot be read as .npz ({error}); fetch it again") from error
    if x is None or y is None:
        raise UserError(f"{path} lacks the array {missing[0]!r}; give a file with {form}")
    require(
        x.dtype == np.uint8 and x.shape[1:] == shape and y.dtype.kind in "iu" and y.ndim == 1,
        f"{path} has x {x.dtype} {x.shape} and y {y.dtype} {y.shape}; give a file with {form}",
    )
    labels = torch.from_numpy(y.astype(np.int64))
    _check_labels(labels, len(x), f"{path}")
    images = torch.from_numpy(x)
    return images.movedim(-1, 1) if channels == 3 else images[:, None], labels


def optdigits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 digits (Alpaydin & Kaynak 1998): 1×8×8, 0..16 scaled to 0..255."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(images).reshape(-1, 1, 8, 8).mul(255 / 16).round()
    return pixels.to(torch.uint8), torch.from_numpy(labels).long()


def _check_labels(labels: Tensor, n: int, where: str) -> None:
    require(
        len(labels) == n, f"{where} holds {len(labels)} labels for {n} images; give a whole set"
    )
    require(
        n > 0 and int(labels.min()) >= 0 and int(labels.max()) <= 9,
        f"{where} holds no label or one outside 0..9; give the digit of each image",
    )
