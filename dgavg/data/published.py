"""Published data sets of images: finding their folders, checking what is in them, loading them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dgavg.data.domains import DomainDataset
from dgavg.data.downloads import Archive, fetch
from dgavg.data.folder import Tree, check_image_settings, find_tree, load_files
from dgavg.data.official import has_lists, official_splits, renumbered
from dgavg.data.sources import data_root
from dgavg.errors import UserError, require, unknown

Filter = Callable[[Tree, Path], Tree]


@dataclass(frozen=True)
class Published:
    """What is known of a data set of the form root/domain/class/image.

    `domains` are in index order, each with other spellings of its folder; upper and lower case,
    blanks and punctuation make no difference. `classes` are their names, or how many there are.
    `counts` are the images of each domain and `total` of all, where known; where they are not
    `certain` a difference is a note and no error. `folders` are usual names of the root, `page` is
    where people get it, and `archives` is where the library does.
    """

    name: str
    title: str
    domains: Mapping[str, tuple[str, ...]]
    classes: tuple[str, ...] | int
    counts: Mapping[str, int]
    total: int
    certain: bool
    folders: tuple[str, ...]
    page: str
    archives: tuple[Archive, ...] = ()
    arrange: Callable[[Path], object] | None = None

    @property
    def by_hand(self) -> str:
        """How to get it without the library."""
        return f"get it by hand ({self.page}) and set data.root=FOLDER to its folder"


def load_published(
    about: Published,
    *,
    root: str | None,
    size: int,
    domains: Sequence[str] | None,
    check: bool,
    download: bool,
    on_bad_image: str,
    workers: int,
    cache: str | None,
    lists: str | None = "none",
    without: Filter | None = None,
) -> DomainDataset:
    """Load a published data set; settings as those of its loader.

    `without` leaves files out before they are counted. `lists` is the folder of official split
    lists (null: `splits` in the root, `none`: no lists).

    Raises `UserError` where the data set is not to be found, has other domains, classes or counts
    than it should, or where `folder` would.
    """
    check_image_settings(size, on_bad_image, workers)
    for name in domains or ():
        if name not in about.domains:
            raise unknown("domain", name, about.domains, f"{about.title} (data.domains)")
    base = data_root(root)
    place = _place(about, base)
    if place is None and download:
        target = base / about.folders[0]
        fetch(target, about.archives, lambda part: _arranged(about, part, check), about.by_hand)
        place = target
    if place is None:
        offer = ", data.download=true to fetch it" if about.archives else ""
        raise UserError(
            f"no {about.title} in {base} (nor in its {', '.join(about.folders)}): set data.root="
            f"FOLDER to its tree domain/class/image{offer}, or {about.by_hand}"
        )
    tree = named_tree(about, place, domains)
    if without is not None:
        tree = without(tree, place)
    notes = check_counts(about, tree, place, whole=domains is None) if check else ()
    data = load_files(
        tree,
        place,
        size=size,
        on_bad_image=on_bad_image,
        workers=workers,
        cache=cache,
        title=about.name,
        notes=notes,
    )
    return _with_lists(data, tree, place, lists)


def named_tree(about: Published, place: Path, wanted: Sequence[str] | None = None) -> Tree:
    """The files in `place` by the usual names of their domains, in index order.

    Raises `UserError` for a domain that is missing or there twice, and what `find_tree` raises.
    """
    found = _matches(about, place)
    folders: dict[str, str] = {}
    for name in about.domains:
        if wanted is not None and name not in wanted:
            continue
        spellings = found.get(name, [])
        there = ", ".join(sorted(folder for part in found.values() for folder in part))
        require(
            len(spellings) > 0,
            f"{about.title} in {place} has no folder of domain {name!r} (there are {there}); add "
            "it, or name those to load in data.domains=[...]",
        )
        require(
            len(spellings) == 1,
            f"{about.title} in {place} has domain {name!r} twice: {', '.join(spellings)}; keep one",
        )
        folders[name] = spellings[0]
    tree = find_tree(place, list(folders.values()))
    return {name: tree[folder] for name, folder in folders.items()}


def check_counts(about: Published, tree: Tree, place: Path, *, whole: bool) -> tuple[str, ...]:
    """Notes on counts that differ where counts are not certain.

    Raises `UserError` for other classes than there should be, and for counts where they are.
    """
    remedy = "fetch it again, or set data.check=false to take what is there"
    classes = list(next(iter(tree.values())))
    if isinstance(about.classes, int):
        fine, expected = len(classes) == about.classes, f"{about.classes} classes"
    else:
        fine = [plain(c) for c in classes] == [plain(c) for c in about.classes]
        expected = f"classes {', '.join(about.classes)}"
    shown = ", ".join(classes[:12]) + (", ..." if len(classes) > 12 else "")
    require(
        fine,
        f"{about.title} in {place} has {len(classes)} classes ({shown}), not {expected}; {remedy}",
    )
    counts = {name: sum(map(len, by_class.values())) for name, by_class in tree.items()}
    wrong = [
        f"{name} has {n}, not {about.counts[name]}"
        for name, n in counts.items()
        if n != about.counts.get(name, n)
    ]
    total = sum(counts.values())
    if not wrong and whole and total != about.total:
        wrong = [f"there are {total}, not {about.total}"]
    said = f"{about.title} in {place}: other counts of images than published: {'; '.join(wrong)}"
    require(not (wrong and about.certain), f"{said}; {remedy}")
    return (said,) if wrong else ()


def _with_lists(data: DomainDataset, tree: Tree, place: Path, lists: str | None) -> DomainDataset:
    if lists == "none":
        return data
    folder = Path(lists).expanduser() if lists else place / "splits"
    there = has_lists(folder, tree)
    require(
        there or lists is None,
        f"no official list <domain>_train_kfold.txt of {', '.join(tree)} in {folder}; mend "
        "data.lists=FOLDER",
    )
    if not there:
        return data
    splits, notes = official_splits(folder, tree)
    keys = []
    for domain, by_class in zip(data.domains, tree.values(), strict=True):
        names = [p.relative_to(place).as_posix() for files in by_class.values() for p in files]
        keys.append((names, domain.files or ()))
    return replace(data, official=renumbered(splits, keys), notes=data.notes + notes)


def _place(about: Published, base: Path) -> Path | None:
    """`base` or a usual folder in it, whichever has domains of the data set."""
    for folder in (base, *(base / name for name in about.folders)):
        if folder.is_dir() and 2 * len(_matches(about, folder)) >= len(about.domains):
            return folder
    return None


def _matches(about: Published, folder: Path) -> dict[str, list[str]]:
    """Domain → the folders that are called so."""
    known = {plain(s): name for name, more in about.domains.items() for s in (name, *more)}
    found: dict[str, list[str]] = {}
    for entry in sorted(folder.iterdir()):
        name = known.get(plain(entry.name))
        if name is not None and entry.is_dir():
            found.setdefault(name, []).append(entry.name)
    return found


def plain(name: str) -> str:
    """A name without what its spellings differ in.

    >>> plain("terra_incognita") == plain("TerraIncognita")
    True
    """
    return "".join(c for c in name.lower() if c.isalnum())


def _arranged(about: Published, part: Path, check: bool) -> Path:
    """Where the tree is among what was downloaded, checked."""
    if about.arrange is not None:
        about.arrange(part)
    inside = [part, *sorted(part.glob("*")), *sorted(part.glob("*/*"))]
    place = next(
        (p for p in inside if p.is_dir() and len(_matches(about, p)) == len(about.domains)), None
    )
    require(
        place is not None, f"there are no folders {', '.join(about.domains)} in it; {about.by_hand}"
    )
    assert place is not None
    if check:
        check_counts(about, named_tree(about, place), place, whole=True)
    return place
