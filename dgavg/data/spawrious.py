"""Spawrious: dogs whose breed goes with a place, and then with another."""

from __future__ import annotations

from pathlib import Path

from dgavg.data.domains import DomainDataset
from dgavg.data.downloads import Archive, fetch
from dgavg.data.folder import Tree, check_image_settings, images_in, load_files
from dgavg.data.registry import dataset
from dgavg.data.sources import data_root
from dgavg.errors import UserError, require, unknown

CLASSES = ("bulldog", "corgi", "dachshund", "labrador")
BREEDS = ("bulldog", "dachshund", "labrador", "corgi")  # the order of the places below
IMAGES = 3168  # of each class at each place
SHARES = (0.97, 0.87)  # of a class at its own place, in the two training domains of o2o

# variant → places of the breeds in training and in the test domain, and of the rest in training
VARIANTS: dict[str, tuple[tuple[str, ...], tuple[str, ...], str | None]] = {
    "o2o_easy": (
        ("desert", "jungle", "dirt", "snow"),
        ("dirt", "snow", "desert", "jungle"),
        "beach",
    ),
    "o2o_medium": (
        ("mountain", "beach", "dirt", "jungle"),
        ("jungle", "dirt", "beach", "snow"),
        "desert",
    ),
    "o2o_hard": (
        ("jungle", "mountain", "snow", "desert"),
        ("mountain", "snow", "desert", "jungle"),
        "beach",
    ),
    "m2m_easy": (
        ("desert", "mountain", "dirt", "jungle"),
        ("dirt", "jungle", "mountain", "desert"),
        None,
    ),
    "m2m_medium": (
        ("beach", "snow", "mountain", "desert"),
        ("desert", "mountain", "beach", "snow"),
        None,
    ),
    "m2m_hard": (
        ("dirt", "jungle", "snow", "beach"),
        ("snow", "beach", "dirt", "jungle"),
        None,
    ),
}
SWAPPED = (1, 0, 3, 2)  # m2m: where a breed goes in the second domain
FOLDERS = ("spawrious224", "spawrious")
PAGE = "https://github.com/aengusl/spawrious"
ARCHIVES = (
    Archive("https://www.dropbox.com/s/e40j553480h3f3s/spawrious224.tar.gz?dl=1", "all.tar.gz"),
)


@dataset("spawrious")
def spawrious(
    *,
    variant: str = "o2o_easy",
    root: str | None = None,
    size: int = 224,
    check: bool = True,
    download: bool = False,
    on_bad_image: str = "error",
    workers: int = 0,
    cache: str | None = None,
) -> DomainDataset:
    """Spawrious: four breeds of dogs at places that mislead (domains Test, SC_group_1, SC_group_2).

    `variant` is one of `o2o_easy`, `o2o_medium`, `o2o_hard`, `m2m_easy`, `m2m_medium`, `m2m_hard`.
    One to one: 97 % and 87 % of a breed's training images are at a place of its own, the rest at
    one that all share; in `Test` places are swapped. Many to many: two breeds change places from
    one training domain to the other. Images of a folder are taken in the order of their names,
    where DomainBed takes them as the file system lists them.

    `root` is the folder with `0/` and `1/` in it or one above (null: $DGAVG_DATA, then `data`).
    Every folder must have 3,168 images; with `check=false` the smallest sets the scale. Other
    settings: see `folder`.

    Source: Lynch et al. 2023 (arXiv 2303.05470), as in DomainBed's `Spawrious*` classes.

    Raises `UserError` for an unknown variant and where a folder or images are missing.
    """
    check_image_settings(size, on_bad_image, workers)
    if variant not in VARIANTS:
        raise unknown("data.variant", variant, VARIANTS)
    base = data_root(root)
    place = _place(base)
    if place is None and download:
        place = base / FOLDERS[0]
        by_hand = f"get it by hand ({PAGE}) and set data.root=FOLDER"
        fetch(place, ARCHIVES, _arranged, by_hand)
    if place is None:
        raise UserError(
            f"no Spawrious in {base} (nor in its {', '.join(FOLDERS)}): set data.root=FOLDER to "
            f"the folder with 0/place/breed/image in it (from {PAGE}), or data.download=true"
        )
    return load_files(
        combined(place, variant, check),
        place,
        size=size,
        on_bad_image=on_bad_image,
        workers=workers,
        cache=cache,
        title=f"spawrious_{variant}",
    )


def combined(place: Path, variant: str, check: bool) -> Tree:
    """The files of each domain and class of a variant."""
    parts = _parts(variant)
    folders = {folder for part in parts.values() for _, folder, _ in part}
    images = {folder: _images(place / folder) for folder in sorted(folders)}
    least = min(map(len, images.values()))
    for folder, files in images.items():
        require(
            not check or len(files) == IMAGES,
            f"{place / folder} has {len(files)} images, not {IMAGES}; fetch Spawrious again "
            f"({PAGE}), or set data.check=false to take what is there",
        )
    total = IMAGES if check else least
    tree: Tree = {domain: {label: [] for label in CLASSES} for domain in parts}
    for domain, part in parts.items():
        for label, folder, share in part:
            own = int(abs(share) * total)
            files = images[folder]
            tree[domain][label] += files[: own if share >= 0 else total - own]
    return tree


def _parts(variant: str) -> dict[str, list[tuple[str, str, float]]]:
    """Domain → class, folder and share of its images; -s is what a share of s leaves."""
    train, test, rest = VARIANTS[variant]
    domains: dict[str, list[tuple[str, str, float]]] = {"Test": []}
    for group, share in enumerate(SHARES):
        part = domains.setdefault(f"SC_group_{group + 1}", [])
        for i, breed in enumerate(BREEDS):
            if rest is not None:  # the images of the two groups are in two folders
                part.append((breed, f"{group}/{train[i]}/{breed}", share))
                part.append((breed, f"{group}/{rest}/{breed}", -share))
                domains["Test"].append((breed, f"{group}/{test[i]}/{breed}", 1.0))
            else:
                j = SWAPPED[i] if group else i
                part.append((breed, f"0/{train[j]}/{breed}", 1.0))
                domains["Test"].append((breed, f"0/{test[j]}/{breed}", 1.0))
    return domains


def _images(folder: Path) -> list[Path]:
    require(folder.is_dir(), f"Spawrious lacks {folder}; fetch it again ({PAGE})")
    files = images_in(folder)
    require(bool(files), f"Spawrious has no image in {folder}; fetch it again ({PAGE})")
    return files


def _place(base: Path) -> Path | None:
    """`base` or a folder in it that has places and breeds below `0`."""
    for folder in (base, *(base / name for name in FOLDERS)):
        if (folder / "0").is_dir() and any((folder / "0").glob("*/bulldog")):
            return folder
    return None


def _arranged(part: Path) -> Path:
    place = _place(part)
    require(place is not None, f"there is no 0/place/breed in it; get Spawrious by hand ({PAGE})")
    assert place is not None
    return place
