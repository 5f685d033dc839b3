"""Published split lists: which images a data set's authors train, validate and test on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from dgavg.data.splits import Keys, Splits
from dgavg.errors import UserError, require

Tree = Mapping[str, Mapping[str, Sequence[Path]]]  # domain → class → images, in the order of keys

PARTS = ("train", "crossval", "test")
"""A domain has a list of each: `<domain>_<part>_kfold.txt`, lines "domain/class/file label"."""

SHOWN = 3  # of each kind of erratum written out
REMEDY = "mend it, or set data.lists=none to go without official splits"


def has_lists(folder: Path, domains: Iterable[str]) -> bool:
    """Whether any of the lists of `domains` is in `folder`."""
    return any(_list(folder, domain, part).is_file() for domain in domains for part in PARTS)


def official_splits(folder: Path, tree: Tree) -> tuple[Splits, tuple[str, ...]]:
    """The splits that the lists in `folder` make of the images in `tree`, and what was odd in them.

    `in_` is the train list, `out` the crossval list and `test` the test list, which has all images
    of a domain. Images are found by class and name, or by the name without its suffix, since
    copies of a data set differ in that. Errata of published lists are taken as they are meant, and
    reported: a label 0 where labels count from 1 (the folder says the class), an image listed
    twice, an image in neither list (tested on, not trained on).

    Source of the form and of the lists: PACS, Li et al. 2017 (arXiv 1710.03077).

    Raises `UserError` that names list and line for a list that is missing, a line of another form,
    an image that is not there, a label that contradicts the folder, and an image that is both in
    the train and in the crossval list.
    """
    parts: dict[str, list[Keys]] = {part: [] for part in PARTS}
    odd = _Errata()
    classes = list(next(iter(tree.values())))
    for domain, by_class in tree.items():
        images = _Images(domain, by_class)
        lines = {part: _keys(_list(folder, domain, part), images, classes, odd) for part in PARTS}
        both = next((key for key in lines["train"] if key in lines["crossval"]), None)
        if both is not None:
            train, crossval = (_list(folder, domain, part) for part in PARTS[:2])
            raise UserError(
                f"{crossval} line {lines['crossval'][both]}: {images.names[both]} stands in line "
                f"{lines['train'][both]} of {train.name}, too, so training would see validation; "
                + REMEDY
            )
        odd.neither += [
            name
            for key, name in enumerate(images.names)
            if key not in lines["train"] and key not in lines["crossval"]
        ]
        odd.untested += [n for key, n in enumerate(images.names) if key not in lines["test"]]
        for part, keys in lines.items():
            path = _list(folder, domain, part)
            require(bool(keys), f"{path} lists no image; {REMEDY}")
            parts[part].append(np.array(sorted(keys), np.int64))
    out, in_, test = (tuple(parts[part]) for part in ("crossval", "train", "test"))
    return Splits(out=out, in_=in_, test=test), odd.notes()


def renumbered(splits: Splits, names: Sequence[tuple[Sequence[str], Sequence[str]]]) -> Splits:
    """The same splits where images were left out: for each domain all names, and those kept."""
    places = []
    for before, after in names:
        place = {name: key for key, name in enumerate(after)}
        places.append(np.array([place.get(name, -1) for name in before], np.int64))

    def part(keys_of: tuple[Keys, ...]) -> tuple[Keys, ...]:
        new = (place[keys] for place, keys in zip(places, keys_of, strict=True))
        return tuple(keys[keys >= 0] for keys in new)

    test = None if splits.test is None else part(splits.test)
    return Splits(out=part(splits.out), in_=part(splits.in_), test=test)


@dataclass
class _Errata:
    """What was odd in lists that could be read all the same, as pieces of a sentence."""

    zero: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    neither: list[str] = field(default_factory=list)
    untested: list[str] = field(default_factory=list)
    suffix: list[str] = field(default_factory=list)

    def notes(self) -> tuple[str, ...]:
        kinds = (
            ("label 0 where labels count from 1, read by the folder", self.zero),
            ("listed twice, taken once", self.twice),
            ("in neither the train nor the crossval list, so not trained on", self.neither),
            ("not in the test list, so not tested on", self.untested),
            ("found under another suffix", self.suffix),
        )
        said = [f"{len(found)} {what} ({_some(found)})" for what, found in kinds if found]
        return (f"official splits: {'; '.join(said)}",) if said else ()


class _Images:
    """The images of a domain: their keys by domain, class and name."""

    def __init__(self, domain: str, by_class: Mapping[str, Sequence[Path]]) -> None:
        self.names: list[str] = []  # by key: domain/class/file
        self.exact: dict[tuple[str, str, str], int] = {}
        self.stems: dict[tuple[str, str, str], list[int]] = defaultdict(list)
        for label, paths in by_class.items():
            for path in paths:
                key = len(self.names)
                self.names.append(f"{domain}/{label}/{path.name}")
                self.exact[domain, label, path.name] = key
                self.stems[domain, label, path.stem].append(key)


def _keys(path: Path, images: _Images, classes: list[str], odd: _Errata) -> dict[int, int]:
    """Key → line of the images in one list."""
    found: dict[int, int] = {}
    for number, name, label in _lines(path):
        where = f"{path} line {number}"
        folder, label_folder, file = PurePosixPath(name).parts[-3:]
        key = images.exact.get((folder, label_folder, file))
        if key is None:
            near = images.stems.get((folder, label_folder, PurePosixPath(file).stem), [])
            there = "more than one" if len(near) > 1 else "no"
            require(len(near) == 1, f"{where}: there is {there} image {name}; {REMEDY}")
            (key,) = near
            odd.suffix.append(name)
        expected = classes.index(label_folder) + 1
        require(
            label in (0, expected),
            f"{where}: {name} has label {label}, but folder {label_folder!r} is label {expected}; "
            + REMEDY,
        )
        if label == 0:
            odd.zero.append(f"{path.name} line {number}: {name}")
        if key in found:
            odd.twice.append(f"{name} in {path.name} lines {found[key]} and {number}")
        found.setdefault(key, number)
    return found


def _lines(path: Path) -> Iterator[tuple[int, str, int]]:
    """Number, image and label of each line of a list."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(
            f"no {path.name} in {path.parent}, where other official lists are; add it, or set "
            "data.lists=none to go without official splits"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as text ({error}); {REMEDY}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        fine = label.isdecimal() and len(PurePosixPath(name).parts) >= 3
        form = "'domain/class/file label'"
        require(fine, f"{path} line {number}: {line.strip()[:80]!r} is not {form}; {REMEDY}")
        yield number, name, int(label)


def _list(folder: Path, domain: str, part: str) -> Path:
    return folder / f"{domain}_{part}_kfold.txt"


def _some(items: Sequence[str]) -> str:
    more = [f"{len(items) - SHOWN} more"] if len(items) > SHOWN else []
    return ", ".join([*items[:SHOWN], *more])
