"""The image benchmarks of DomainBed by name: PACS, VLCS, OfficeHome, TerraIncognita and more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dgavg.data.catalogue import (
    DOMAINBED,
    DOMAINNET,
    DUPLICATES,
    OFFICEHOME,
    PACS,
    SVIRO,
    TERRA,
    VLCS,
)
from dgavg.data.domains import DomainDataset
from dgavg.data.folder import Tree
from dgavg.data.published import Published, load_published
from dgavg.data.registry import dataset
from dgavg.errors import UserError, require


def remove_duplicates(tree: Tree, place: Path, duplicates: str | None) -> Tree:
    """DomainNet without the images that are there twice, by DomainBed's list of them.

    Nothing is left out where the count says that it has happened before. Raises `UserError` where
    it has not and there is no list, or none that names these files.
    """
    path = Path(duplicates).expanduser() if duplicates else place / DUPLICATES
    counts = {name: sum(map(len, by_class.values())) for name, by_class in tree.items()}
    if duplicates is None and all(n == DOMAINNET.counts[name] for name, n in counts.items()):
        return tree
    require(
        duplicates is not None or path.is_file(),
        f"DomainNet in {place} has {sum(counts.values())} images, where "
        f"{sum(DOMAINNET.counts[name] for name in counts)} are none twice; set data.duplicates="
        f"FILE to the list of the others ({DOMAINBED}/{DUPLICATES}), or data.check=false",
    )
    try:
        names = path.read_text(encoding="utf-8").split()
    except (OSError, ValueError) as error:
        raise UserError(
            f"data.duplicates={path} cannot be read ({error}); fetch it again"
        ) from error
    twice = {tuple(name.split("/")[-3:]) for name in names}
    kept = {
        domain: {
            label: [path for path in files if (domain, label, path.name) not in twice]
            for label, files in by_class.items()
        }
        for domain, by_class in tree.items()
    }
    named = any(item[0] in tree for item in twice)
    require(named, f"{path} names no image of {', '.join(tree)}; give DomainBed's {DUPLICATES}")
    for domain, by_class in kept.items():
        for label, files in by_class.items():
            require(
                bool(files),
                f"{path} leaves no image of class {label!r} of domain {domain!r}; give DomainBed's "
                + DUPLICATES,
            )
    return kept


@dataset("pacs")
def pacs(
    *,
    root: str | None = None,
    size: int = 224,
    domains: list[str] | None = None,
    lists: str | None = None,
    check: bool = True,
    download: bool = False,
    on_bad_image: str = "error",
    workers: int = 0,
    cache: str | None = None,
) -> DomainDataset:
    """PACS: art paintings, cartoons, photos, sketches (9,991 images, 7 classes).

    `root` is its folder or the one above (null: $DGAVG_DATA, then `data`); spellings of domain
    folders that are about are known, and domains have DomainBed's order. `domains` keeps only
    these. Classes and counts of images are checked (`check=false` takes what is there). `download`
    fetches what is missing. Official splits (`protocol.splits=official`) are read from `lists`, the
    folder of the published `<domain>_{train,crossval,test}_kfold.txt` (null: `splits` in the root
    where it is there, `none`: no lists); their errata are in the notes. `size`, `on_bad_image`,
    `workers` and `cache` are those of `folder`.

    Source: Li et al. 2017 (arXiv 1710.03077).

    Raises `UserError` where it is not to be found, can't be fetched or is not whole, and for wrong
    lists.
    """
    return load_published(
        PACS,
        root=root,
        size=size,
        domains=domains,
        check=check,
        download=download,
        on_bad_image=on_bad_image,
        workers=workers,
        cache=cache,
        lists=lists,
    )


@dataset("domainnet")
def domainnet(
    *,
    root: str | None = None,
    size: int = 224,
    domains: list[str] | None = None,
    duplicates: str | None = None,
    check: bool = True,
    download: bool = False,
    on_bad_image: str = "error",
    workers: int = 0,
    cache: str | None = None,
) -> DomainDataset:
    """DomainNet: six kinds of pictures, no image twice (586,575 images, 345 classes).

    `duplicates` is DomainBed's list of 9,431 images that are left out, a text file
    "domain/class/file" (null: `domain_net_duplicates.txt` in the root, where it is there; none is
    needed where they are gone already). With `check=false` and no list all images are kept. Counts
    that differ are a note. Other settings: see `pacs`.

    Source: Peng et al. 2019 (arXiv 1812.01754), without duplicates as in DomainBed
    (arXiv 2007.01434).
    """

    def without(tree: Tree, place: Path) -> Tree:
        keep_all = not check and duplicates is None and not (place / DUPLICATES).is_file()
        return tree if keep_all else remove_duplicates(tree, place, duplicates)

    return load_published(
        DOMAINNET,
        root=root,
        size=size,
        domains=domains,
        check=check,
        download=download,
        on_bad_image=on_bad_image,
        workers=workers,
        cache=cache,
        without=without,
    )


def _loader(about: Published, doc: str) -> Callable[..., DomainDataset]:
    """Register a loader that has no settings of its own."""

    def load(
        *,
        root: str | None = None,
        size: int = 224,
        domains: list[str] | None = None,
        check: bool = True,
        download: bool = False,
        on_bad_image: str = "error",
        workers: int = 0,
        cache: str | None = None,
    ) -> DomainDataset:
        return load_published(
            about,
            root=root,
            size=size,
            domains=domains,
            check=check,
            download=download,
            on_bad_image=on_bad_image,
            workers=workers,
            cache=cache,
        )

    load.__name__, load.__doc__ = about.name, doc
    return dataset(about.name)(load)


vlcs = _loader(
    VLCS,
    """VLCS: Caltech101, LabelMe, SUN09, VOC2007 (10,729 images, 5 classes).

    Settings: see `pacs`.

    Source: Fang et al. 2013 (ICCV, "Unbiased Metric Learning"), as in DomainBed
    (arXiv 2007.01434).
    """,
)
officehome = _loader(
    OFFICEHOME,
    """OfficeHome: art, clipart, product and real-world images (15,588 images, 65 classes).

    Counts that differ are a note. Settings: see `pacs`.

    Source: Venkateswara et al. 2017 (arXiv 1706.07522).
    """,
)
terra_incognita = _loader(
    TERRA,
    """TerraIncognita: wild animals before camera traps at four places (24,330 images, 10 classes).

    Counts that differ are a note: DomainBed's paper has 24,788 images, what can be fetched today
    makes 24,330. Settings: see `pacs`.

    Source: Beery et al. 2018 (arXiv 1807.04975), in DomainBed's selection (arXiv 2007.01434).
    """,
)
sviro = _loader(
    SVIRO,
    """SVIRO: who sits on the rear seat, rendered in ten cars (56,000 images, 7 classes).

    Counts that differ are a note. Settings: see `pacs`.

    Source: Dias Da Cruz et al. 2020 (arXiv 2001.03483), in DomainBed's form (arXiv 2007.01434).
    """,
)
