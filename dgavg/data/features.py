"""Features computed once: a data set in one `.npz`, for training heads alone in seconds."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from dgavg.data.domains import Domain, DomainDataset
from dgavg.data.registry import dataset
from dgavg.data.splits import Splits
from dgavg.disk import write_atomically
from dgavg.errors import UserError, require

Arrays = dict[str, NDArray[Any]]

FORM = (
    "X float16 or float32 (N, features), y (N,) classes and d (N,) domains, as numbers from 0 or "
    "as names"
)


@dataset("features")
def features(
    *,
    file: str,
    domains: list[str] | None = None,
    classes: list[str] | None = None,
    title: str | None = None,
) -> DomainDataset:
    """Features computed before, from one .npz: a head trains in seconds (F×1×1).

    Arrays: `X` float16 or float32 (N, F); `y` and `d`, the class and the domain of each row, as
    numbers from 0 or as names; optionally `train`, bool (N,), an official training list (the rest
    is then the validation part, and all is tested on); `domains` and `classes`, the names that
    numbers stand for; `title`, what tables call it. The settings name what the file does not.
    Domains and classes given by name alone are sorted, as folders are. `dgavg features` writes such
    files. Nothing in one can run code: arrays of objects are refused.

    Linear probes on frozen features of the source: Kumar et al. 2022 (arXiv 2202.10054).

    Raises `UserError` for a file that is missing, damaged or has other arrays in it.
    """
    path = Path(file).expanduser()
    arrays = _read(path)
    x = _checked(path, arrays)
    d, domain_names = _numbered(path, "d", arrays["d"], "domains", domains or arrays.get("domains"))
    y, class_names = _numbered(path, "y", arrays["y"], "classes", classes or arrays.get("classes"))
    rows = [np.flatnonzero(d == i) for i in range(len(domain_names))]
    for name, keys in zip(domain_names, rows, strict=True):
        require(len(keys) > 0, f"{path} has no row of domain {name!r}; name only those it has")
    parts = tuple(
        Domain(name, torch.from_numpy(x[keys])[:, :, None, None], torch.from_numpy(y[keys]))
        for name, keys in zip(domain_names, rows, strict=True)
    )
    stored = str(arrays["title"]) if "title" in arrays else path.stem
    official = _official(path, arrays["train"], rows, domain_names) if "train" in arrays else None
    return DomainDataset(title or stored, parts, class_names, official=official)


def write_features(
    path: Path,
    X: ArrayLike,  # noqa: N803 (the array's name in the file)
    y: ArrayLike,
    d: ArrayLike,
    domains: Sequence[str],
    classes: Sequence[str],
    title: str,
    content: str,
    train: ArrayLike | None = None,
) -> None:
    """Write what `data=features` reads, whole or not at all.

    Shapes: `X` float16 or float32 (N, F); `y` and `d` integers (N,), places in `classes` and
    `domains`; `train` bool (N,). `content` is the fingerprint of the images that the features were
    computed from. Raises `UserError` for arrays of another form and where the file can't be
    written.
    """
    arrays: Arrays = {
        "X": np.asarray(X),
        "y": np.asarray(y),
        "d": np.asarray(d),
        "domains": np.array(list(domains), dtype=np.str_),
        "classes": np.array(list(classes), dtype=np.str_),
        "title": np.array(title, dtype=np.str_),
        "content": np.array(content, dtype=np.str_),
    }
    if train is not None:
        arrays["train"] = np.asarray(train)
    _checked(path, arrays)
    for key, names in (("d", "domains"), ("y", "classes")):
        _numbered(path, key, arrays[key], names, arrays[names])
    write_atomically(
        path,
        lambda out: np.savez(out, **arrays),  # type: ignore[arg-type]
        hint="choose another --out FILE",
    )


def _read(path: Path) -> Arrays:
    known = ("X", "y", "d", "train", "domains", "classes", "title")
    require(path.is_file(), f"no file {path}; set data.file to an .npz with {FORM}")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in known if name in stored}
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{path} cannot be read as .npz ({reason}); write it again") from error
    missing = [name for name in ("X", "y", "d") if name not in arrays]
    require(not missing, f"{path} lacks the array {', '.join(missing)}; give a file with {FORM}")
    return arrays


def _checked(path: Path, arrays: Arrays) -> NDArray[Any]:
    """X, once the shapes of all arrays fit."""
    x, y, d = arrays["X"], arrays["y"], arrays["d"]
    require(
        x.dtype in (np.float16, np.float32) and x.ndim == 2 and min(x.shape) > 0,
        f"{path} has X {x.dtype} {x.shape}; give {FORM}",
    )
    for name, array in (("y", y), ("d", d)):
        require(
            array.shape == x.shape[:1] and array.dtype.kind in "iuU",
            f"{path} has {name} {array.dtype} {array.shape} for X {x.shape}; give {FORM}",
        )
    train = arrays.get("train")
    require(
        train is None or (train.dtype == np.bool_ and train.shape == x.shape[:1]),
        f"{path} has a train of another form than bool {x.shape[:1]}; mend it or leave it out",
    )
    bad = np.flatnonzero(~np.isfinite(x).all(1))
    require(
        len(bad) == 0,
        f"{path} has {len(bad)} row(s) of X that are not finite, the first is {bad[:1]}; "
        "compute them again (float16 ends at 65504)",
    )
    return x


def _numbered(
    path: Path, key: str, values: NDArray[Any], kind: str, names: Any
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Values as places in their names."""
    given = None if names is None else tuple(map(str, names))
    if values.dtype.kind == "U":
        known = given or tuple(sorted(set(values.tolist())))
        place = {name: i for i, name in enumerate(known)}
        odd = sorted(set(values.tolist()) - set(known))
        require(not odd, f"{path}: {key} has {', '.join(odd)}, not among its {kind} {list(known)}")
        return np.array([place[v] for v in values.tolist()], np.int64), known
    low, high = int(values.min()), int(values.max())
    require(low >= 0, f"{path}: {key} has {low}; number {kind} from 0")
    known = given or tuple(str(i) for i in range(high + 1))
    require(
        high < len(known),
        f"{path}: {key} has {high}, but {kind} names only {len(known)}: {', '.join(known)}; name "
        f"0 to {high} in data.{kind}=[...]",
    )
    return values.astype(np.int64), known


def _official(
    path: Path, train: NDArray[np.bool_], rows: list[NDArray[Any]], names: Sequence[str]
) -> Splits:
    for name, keys in zip(names, rows, strict=True):
        both = bool(train[keys].any()) and not bool(train[keys].all())
        require(both, f"{path}: train leaves nothing of domain {name!r} in one of its two parts")
    return Splits(
        out=tuple(np.flatnonzero(~train[keys]).astype(np.int64) for keys in rows),
        in_=tuple(np.flatnonzero(train[keys]).astype(np.int64) for keys in rows),
        test=tuple(np.arange(len(keys), dtype=np.int64) for keys in rows),
    )
