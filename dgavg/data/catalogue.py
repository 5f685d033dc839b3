"""What is known of the image benchmarks of DomainBed: folders, classes, counts, addresses.

Addresses and Google Drive files are those of DomainBed's `scripts/download.py`; VLCS' counts are
those of its `misc/vlcs_files.txt`, PACS' those of its published lists.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from dgavg.data.downloads import Archive, drive
from dgavg.data.published import Published

PACS = Published(
    name="pacs",
    title="PACS",
    domains={
        "art_painting": ("art", "A"),
        "cartoon": ("C",),
        "photo": ("P",),
        "sketch": ("S",),
    },
    classes=("dog", "elephant", "giraffe", "guitar", "horse", "house", "person"),
    counts={"art_painting": 2048, "cartoon": 2344, "photo": 1670, "sketch": 3929},
    total=9991,
    certain=True,
    folders=("PACS", "pacs", "kfold"),
    page="https://domaingeneralization.github.io",
    archives=(drive("1JFr8f805nMUelQWWmfnJR3y4_SYoN5Pd", "PACS.zip"),),
)

VLCS = Published(
    name="vlcs",
    title="VLCS",
    domains={
        "Caltech101": ("caltech", "C"),
        "LabelMe": ("L",),
        "SUN09": ("sun", "S"),
        "VOC2007": ("voc", "pascal", "V"),
    },
    classes=("bird", "car", "chair", "dog", "person"),
    counts={"Caltech101": 1415, "LabelMe": 2656, "SUN09": 3282, "VOC2007": 3376},
    total=10729,
    certain=True,
    folders=("VLCS", "vlcs"),
    page="https://drive.google.com/uc?id=1skwblH1_okBwxWxmRsp9_qi15hyPpxg8",
    archives=(drive("1skwblH1_okBwxWxmRsp9_qi15hyPpxg8", "VLCS.tar.gz"),),
)

OFFICEHOME = Published(
    name="officehome",
    title="OfficeHome",
    domains={"Art": ("A",), "Clipart": ("C",), "Product": ("P",), "Real_World": ("real", "R")},
    classes=65,
    counts={"Art": 2427, "Clipart": 4365, "Product": 4439, "Real_World": 4357},
    total=15588,
    certain=False,
    folders=("office_home", "OfficeHomeDataset_10072016", "OfficeHome", "officehome"),
    page="https://hemanthdv.org/OfficeHome-Dataset",
    archives=(drive("1uY0pj7oFsjMxRwaD3Sxy0jgel0fsYXLC", "office_home.zip"),),
)

TERRA_CLASSES = (
    *("bird", "bobcat", "cat", "coyote", "dog"),
    *("empty", "opossum", "rabbit", "raccoon", "squirrel"),
)
LILA = "https://storage.googleapis.com/public-datasets-lila/caltechcameratraps"


def arrange_terra(part: Path) -> None:
    """Sort the images of CCT-20 into location_N/class, by its annotations, as DomainBed does.

    An image with several animals is in the folder of each.
    """
    images = part / "eccv_18_all_images_sm"
    kinds: dict[int, str] = {}
    places: dict[str, tuple[str, str]] = {}  # image id → location and file
    seen: set[tuple[str, str]] = set()  # image id and class
    for path in sorted((part / "eccv_18_annotation_files").glob("*.json")):
        content: dict[str, list[dict[str, Any]]] = json.loads(path.read_text(encoding="utf-8"))
        kinds |= {kind["id"]: kind["name"] for kind in content["categories"]}
        for image in content["images"]:
            places[image["id"]] = str(image["location"]), Path(image["file_name"]).name
        for note in content["annotations"]:
            seen.add((note["image_id"], kinds[note["category_id"]]))
    known = {name.removeprefix("location_") for name in TERRA.domains}
    for image_id, kind in sorted(seen):
        location, file = places[image_id]
        if location in known and kind in TERRA_CLASSES:
            folder = part / "tree" / f"location_{location}" / kind
            folder.mkdir(parents=True, exist_ok=True)
            _link(images / file, folder / file)
    shutil.rmtree(images)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


TERRA = Published(
    name="terra_incognita",
    title="TerraIncognita",
    domains={f"location_{n}": (f"L{n}", str(n)) for n in (100, 38, 43, 46)},
    classes=TERRA_CLASSES,
    counts={"location_100": 4741, "location_38": 9736, "location_43": 3970, "location_46": 5883},
    total=24330,
    certain=False,
    folders=("terra_incognita", "TerraIncognita", "terra"),
    page="https://lila.science/datasets/caltech-camera-traps",
    archives=(
        Archive(f"{LILA}/eccv_18_all_images_sm.tar.gz", "images.tar.gz"),
        Archive(f"{LILA}/eccv_18_annotations.tar.gz", "annotations.tar.gz"),
    ),
    arrange=arrange_terra,
)

VISDA = "http://csr.bu.edu/ftp/visda/2019/multi-source"
DUPLICATES = "domain_net_duplicates.txt"
DOMAINBED = "https://github.com/facebookresearch/DomainBed/raw/main/domainbed/misc"

DOMAINNET = Published(
    name="domainnet",
    title="DomainNet",
    domains={
        "clipart": ("clip",),
        "infograph": ("info",),
        "painting": ("paint",),
        "quickdraw": ("quick",),
        "real": (),
        "sketch": (),
    },
    classes=345,
    counts={
        "clipart": 48129,
        "infograph": 51605,
        "painting": 72266,
        "quickdraw": 172500,
        "real": 172947,
        "sketch": 69128,
    },
    total=586575,
    certain=False,
    folders=("domain_net", "DomainNet", "domainnet"),
    page="https://ai.bu.edu/M3SDA",
    archives=(
        *(
            Archive(f"{VISDA}/{path}.zip", f"{path.split('/')[-1]}.zip")
            for path in (
                *("groundtruth/clipart", "infograph", "groundtruth/painting", "quickdraw"),
                *("real", "sketch"),
            )
        ),
        Archive(f"{DOMAINBED}/{DUPLICATES}", DUPLICATES),
    ),
)

SVIRO = Published(
    name="sviro",
    title="SVIRO",
    domains=dict.fromkeys(
        ["aclass", "escape", "hilux", "i3", "lexus", "tesla", "tiguan", "tucson", "x5", "zoe"],
        (),
    ),
    classes=7,
    counts={},
    total=56000,
    certain=False,
    folders=("sviro", "SVIRO", "SVIRO_DOMAINBED"),
    page="https://sviro.kl.dfki.de",
    archives=(Archive("https://sviro.kl.dfki.de/?wpdmdl=1731", "sviro.zip"),),
)
