"""The image benchmarks on tiny trees of their real layouts, and PACS as it is."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from dgavg.data import load, make_splits
from dgavg.data.catalogue import (
    DOMAINNET,
    DUPLICATES,
    OFFICEHOME,
    PACS,
    SVIRO,
    TERRA,
    VLCS,
    arrange_terra,
)
from dgavg.data.published import check_counts

KNOWN = (PACS, VLCS, OFFICEHOME, TERRA, DOMAINNET, SVIRO)
SIZES = {"size": 3, "cache": "none", "workers": 1}

# The folders that DomainBed's own downloads make, in the order it numbers them.
LAYOUTS = {
    "pacs": ("PACS", ["art_painting", "cartoon", "photo", "sketch"]),
    "vlcs": ("VLCS", ["Caltech101", "LabelMe", "SUN09", "VOC2007"]),
    "officehome": ("office_home", ["Art", "Clipart", "Product", "Real World"]),
    "terra_incognita": ("terra_incognita", [f"location_{n}" for n in (100, 38, 43, 46)]),
    "domainnet": (
        "domain_net",
        ["clipart", "infograph", "painting", "quickdraw", "real", "sketch"],
    ),
    "sviro": (
        "sviro",
        ["aclass", "escape", "hilux", "i3", "lexus", "tesla", "tiguan", "tucson", "x5", "zoe"],
    ),
}


@pytest.fixture
def plant(tmp_path):
    """Write tiny images root/domain/class/name.png, each domain in a grey of its own."""

    def write(folder, domains, classes=("bird", "car"), each=2):
        root = tmp_path / "data" / folder
        for i, domain in enumerate(domains):
            for label in classes:
                place = root / domain / label
                place.mkdir(parents=True)
                for k in range(each):
                    Image.new("RGB", (4, 4), (i, i, i)).save(place / f"{k}.png")
        return root

    return write


def greys(data):
    return [int(domain.images[0, 0, 0, 0]) for domain in data.domains]


@pytest.mark.parametrize("about", KNOWN, ids=lambda about: about.name)
def test_the_usual_layout_is_found_from_the_folder_above(plant, about):
    folder, domains = LAYOUTS[about.name]
    root = plant(folder, domains)
    for place in (root, root.parent):
        data = load(about.name, root=str(place), check=False, **SIZES)
        assert data.name == about.name
        assert data.names == tuple(name.replace(" ", "_") for name in domains)
        assert data.names == tuple(about.domains)
        assert greys(data) == list(range(len(domains)))
        assert data.classes == ("bird", "car")
        assert [len(domain) for domain in data.domains] == [4] * len(domains)
        assert data.input_shape == (3, 3, 3)
        assert data.notes == ()


@pytest.mark.parametrize("about", KNOWN, ids=lambda about: about.name)
def test_domains_are_numbered_as_sorted_directories(about):
    domains = LAYOUTS[about.name][1]
    assert domains == sorted(domains)
    assert about.folders[0] == LAYOUTS[about.name][0]


@pytest.mark.parametrize(
    ("name", "folder", "spelt", "order"),
    [
        ("pacs", "pacs", ["S", "P", "C", "A"], [3, 2, 1, 0]),
        ("pacs", "kfold", ["art", "cartoon", "photo", "sketch"], [0, 1, 2, 3]),
        ("pacs", "PACS", ["Art Painting", "Cartoon", "Photo", "Sketch"], [0, 1, 2, 3]),
        ("vlcs", "VLCS", ["CALTECH", "LABELME", "PASCAL", "SUN"], [0, 1, 3, 2]),
        ("vlcs", "vlcs", ["V", "S", "L", "C"], [3, 2, 1, 0]),
        ("officehome", "OfficeHomeDataset_10072016", ["art", "clipart", "product", "real_world"],
         [0, 1, 2, 3]),
        ("officehome", "OfficeHome", ["Art", "Clipart", "Product", "RealWorld"], [0, 1, 2, 3]),
        ("terra_incognita", "TerraIncognita", ["L38", "L43", "L46", "L100"], [3, 0, 1, 2]),
        ("domainnet", "DomainNet", ["clip", "info", "paint", "quick", "real", "sketch"],
         [0, 1, 2, 3, 4, 5]),
    ],
)  # fmt: skip
def test_other_spellings_make_the_same_data_set(plant, name, folder, spelt, order):
    root = plant(folder, spelt)
    data = load(name, root=str(root.parent), check=False, **SIZES)
    assert data.names == tuple(name.replace(" ", "_") for name in LAYOUTS[name][1])
    assert greys(data) == order


def test_names_do_not_change_the_fingerprint(plant):
    usual = load("pacs", root=str(plant("one", list(PACS.domains))), check=False, **SIZES)
    short = load("pacs", root=str(plant("two", ["A", "C", "P", "S"])), check=False, **SIZES)
    assert usual.fingerprint() == short.fingerprint()


def test_without_a_root_the_usual_places_are_searched(plant, tmp_path, monkeypatch, refuses):
    root = plant("PACS", list(PACS.domains))
    monkeypatch.chdir(tmp_path)
    assert load("pacs", check=False, **SIZES).names == tuple(PACS.domains)
    monkeypatch.chdir(root)
    with refuses("no PACS in data", "PACS, pacs", "data.root=FOLDER", "data.download=true"):
        load("pacs", check=False, **SIZES)
    monkeypatch.setenv("DGAVG_DATA", str(root.parent))
    assert load("pacs", check=False, **SIZES).names == tuple(PACS.domains)


@pytest.mark.parametrize("about", KNOWN, ids=lambda about: about.name)
def test_missing_data_say_where_they_are_to_be_had(about, tmp_path, refuses):
    with refuses(f"no {about.title} in {tmp_path}", "data.download=true", about.page):
        load(about.name, root=str(tmp_path))


def test_other_folders_are_passed_over(plant):
    root = plant("PACS", [*PACS.domains, "splits", ".cache", "my own"])
    (root.parent / "photo").mkdir()  # of something else
    data = load("pacs", root=str(root.parent), check=False, **SIZES)
    assert data.names == tuple(PACS.domains)


def test_domains_keeps_some_by_their_usual_names(plant, refuses):
    root = plant("PACS", ["A", "C", "P", "S"])
    data = load("pacs", root=str(root), check=False, domains=["sketch", "cartoon"], **SIZES)
    assert data.names == ("cartoon", "sketch")
    assert greys(data) == [1, 3]
    with refuses("no domain 'sketches' in PACS", "did you mean 'sketch'"):
        load("pacs", root=str(root), domains=["sketches", "photo"], **SIZES)


def test_a_domain_that_is_missing_or_there_twice(plant, refuses):
    root = plant("PACS", ["art_painting", "cartoon", "photo"])
    with refuses("no folder of domain 'sketch'", "art_painting, cartoon, photo", "data.domains="):
        load("pacs", root=str(root), check=False, **SIZES)
    for name in ("S", "sketch"):
        (root / name).mkdir()
    with refuses("domain 'sketch' twice: S, sketch; keep one"):
        load("pacs", root=str(root), check=False, **SIZES)


@pytest.mark.parametrize("about", KNOWN, ids=lambda about: about.name)
def test_a_class_that_one_domain_lacks(about, plant, refuses):
    root = plant(*LAYOUTS[about.name])
    domain = root / LAYOUTS[about.name][1][1]
    for path in (domain / "car").iterdir():
        path.unlink()
    with refuses("has no image of class 'car'", str(domain / "car")):
        load(about.name, root=str(root), check=False, **SIZES)


def paths_of(about, classes, counts):
    """A tree of names: the first class has what the others leave."""
    tree = {}
    for domain, n in counts.items():
        rest = len(classes) - 1
        sizes = dict.fromkeys(classes, 1) | {classes[0]: n - rest}
        tree[domain] = {c: [Path("a.jpg")] * k for c, k in sizes.items()}
    return tree


def classes_of(about):
    if isinstance(about.classes, int):
        return [f"class{i:03}" for i in range(about.classes)]
    return list(about.classes)


@pytest.mark.parametrize("about", KNOWN, ids=lambda about: about.name)
def test_published_counts_pass_and_others_are_told(about, refuses):
    even = dict.fromkeys(about.domains, about.total // len(about.domains))
    counts = dict(about.counts) or even
    assert sum(counts.values()) == about.total
    assert counts.keys() == about.domains.keys()
    names, place = classes_of(about), Path("there")
    tree = paths_of(about, names, counts)
    assert check_counts(about, tree, place, whole=True) == ()
    last = list(counts)[-1]
    tree[last][names[0]].pop()
    expected = [
        f"{last} has {counts[last] - 1}, not {counts[last]}"
        if about.counts
        else f"there are {about.total - 1}, not {about.total}"
    ]
    if about.certain:
        with refuses(f"{about.title} in there", *expected, "data.check=false"):
            check_counts(about, tree, place, whole=True)
    else:
        (note,) = check_counts(about, tree, place, whole=True)
        assert expected[0] in note
    some = {k: tree[k] for k in list(counts)[:2]}
    assert check_counts(about, some, place, whole=False) == ()


@pytest.mark.parametrize("about", KNOWN, ids=lambda about: about.name)
def test_other_classes_are_refused(about, refuses):
    names = classes_of(about)
    counts = dict(about.counts) or dict.fromkeys(about.domains, 5600)
    with refuses(f"has {len(names) + 1} classes", "not", "data.check=false"):
        tree = paths_of(about, [*names, "zebra"], counts)
        check_counts(about, tree, Path("there"), whole=True)
    if not isinstance(about.classes, int):
        with refuses("zebra", f"not classes {', '.join(names)}"):
            tree = paths_of(about, [*names[:-1], "zebra"], counts)
            check_counts(about, tree, Path("there"), whole=True)


def test_counts_are_checked_before_anything_is_decoded(plant, refuses):
    root = plant("PACS", list(PACS.domains), classes=PACS.classes)
    (root / "photo" / "dog" / "0.png").write_bytes(b"no image")
    with refuses("art_painting has 14, not 2048", "sketch has 14, not 3929", "data.check=false"):
        load("pacs", root=str(root), **SIZES)


def test_notes_reach_the_data_set(plant):
    root = plant("terra_incognita", list(TERRA.domains), classes=TERRA.classes, each=1)
    (note,) = load("terra_incognita", root=str(root), **SIZES).notes
    assert "location_100 has 10, not 4741" in note
    assert load("terra_incognita", root=str(root), check=False, **SIZES).notes == ()


def test_domainnet_without_its_duplicates(plant, refuses):
    root = plant("domain_net", list(DOMAINNET.domains), each=3)
    with refuses("DomainNet in", "has 36 images", "586575", "data.duplicates=FILE", DUPLICATES):
        load("domainnet", root=str(root), **SIZES)
    with refuses("12 images", str(48129 + 172947)):
        load("domainnet", root=str(root), domains=["real", "clipart"], **SIZES)
    assert len(load("domainnet", root=str(root), check=False, **SIZES).domains[0]) == 6
    names = ["clipart/bird/0.png", "clipart/car/2.png", "sketch/car/1.png", "real/bird/gone.png"]
    listed = root.parent / "twice.txt"
    listed.write_text("\n".join(names) + "\n")
    data = load("domainnet", root=str(root), check=False, duplicates=str(listed), **SIZES)
    assert [len(domain) for domain in data.domains] == [4, 6, 6, 6, 6, 5]
    kept = {name for domain in data.domains for name in domain.files}
    assert len(kept) == 33
    assert not kept & set(names)
    listed.rename(root / DUPLICATES)
    again = load("domainnet", root=str(root), check=False, **SIZES)
    assert again.fingerprint() == data.fingerprint()


def test_a_wrong_list_of_duplicates(plant, refuses):
    root = plant("domain_net", list(DOMAINNET.domains), each=1)
    listed = root / "twice.txt"
    settings = {"root": str(root), "check": False, "duplicates": str(listed), **SIZES}
    with refuses("data.duplicates=", "twice.txt cannot be read"):
        load("domainnet", **settings)
    listed.write_text("a b c\n")
    with refuses("names no image of clipart", DUPLICATES):
        load("domainnet", **settings)
    listed.write_text("real/car/0.png\n")
    with refuses("leaves no image of class 'car' of domain 'real'"):
        load("domainnet", **settings)


def test_terra_is_sorted_by_its_annotations(tmp_path):
    images = tmp_path / "eccv_18_all_images_sm"
    images.mkdir()
    for name in "abcde":
        Image.new("L", (2, 2)).save(images / f"{name}.jpg")
    notes = tmp_path / "eccv_18_annotation_files"
    notes.mkdir()
    kinds = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}, {"id": 3, "name": "badger"}]
    for i, (photos, seen) in enumerate(
        [
            ([("a", 38), ("b", "100")], [("a", 1), ("a", 2), ("b", 1)]),
            ([("c", 38), ("d", 7), ("e", 46)], [("c", 3), ("d", 1), ("e", 2), ("e", 2)]),
        ]
    ):
        content = {
            "categories": kinds,
            "images": [
                {"id": name, "location": place, "file_name": f"{name}.jpg"}
                for name, place in photos
            ],
            "annotations": [{"image_id": name, "category_id": kind} for name, kind in seen],
        }
        (notes / f"{i}.json").write_text(json.dumps(content))
    arrange_terra(tmp_path)
    tree = tmp_path / "tree"
    found = sorted(path.relative_to(tree).as_posix() for path in tree.rglob("*.jpg"))
    assert found == [
        "location_100/dog/b.jpg",
        "location_38/cat/a.jpg",
        "location_38/dog/a.jpg",
        "location_46/cat/e.jpg",
    ]
    assert not images.exists()


def list_all(root, folder, label=None):
    """Official lists of a tree: the first image of each class is out."""
    folder.mkdir(exist_ok=True)
    for domain in PACS.domains:
        lines = {"train": [], "crossval": [], "test": []}
        for path in sorted(root.glob(f"{domain}/*/*.png")):
            name = path.relative_to(root).as_posix()
            line = f"{name} {label or 1 + sorted(PACS.classes).index(path.parent.name)}\n"
            lines["test"].append(line)
            lines["crossval" if path.stem == "0" else "train"].append(line)
        for part, text in lines.items():
            (folder / f"{domain}_{part}_kfold.txt").write_text("".join(text))


def test_pacs_has_official_splits_where_its_lists_are(plant, refuses):
    root = plant("PACS", list(PACS.domains), classes=PACS.classes, each=3)
    settings = {"root": str(root), "check": False, **SIZES}
    assert load("pacs", **settings).official is None
    lists = root.parent / "lists"
    with refuses("no official list", str(lists), "data.lists=FOLDER"):
        load("pacs", lists=str(lists), **settings)
    list_all(root, lists)
    assert load("pacs", **settings).official is None
    lists.rename(root / "splits")
    data = load("pacs", **settings)
    assert data.notes == ()
    assert load("pacs", lists="none", **settings).official is None
    splits = make_splits(data, 0.2, 0, "official")
    assert splits.out[2].tolist() == list(range(0, 21, 3))
    assert sorted([*splits.out[2], *splits.in_[2]]) == splits.test[2].tolist() == list(range(21))
    with (root / "splits" / "photo_test_kfold.txt").open("a") as file:
        file.write("photo/dog/1.png 1\n")
    some = load("pacs", domains=["photo", "sketch"], **settings)
    assert len(some.official.test) == 2
    (note,) = some.notes
    assert "listed twice, taken once (photo/dog/1.png in photo_test_kfold.txt lines 2 and" in note
    list_all(root, root / "splits", label=5)
    with refuses("art_painting_train_kfold.txt line 1", "label 5", "data.lists=none"):
        load("pacs", **settings)


def test_official_splits_go_round_images_that_cannot_be_read(plant):
    root = plant("PACS", list(PACS.domains), classes=PACS.classes, each=3)
    list_all(root, root / "splits")
    (root / "photo" / "dog" / "1.png").write_bytes(b"")
    data = load("pacs", root=str(root), check=False, on_bad_image="skip", **SIZES)
    assert len(data.domains[2]) == 20
    assert data.official.out[2].tolist() == [0, *range(2, 20, 3)]
    assert data.official.test[2].tolist() == list(range(20))


@pytest.mark.slow
def test_real_pacs_by_name(real_data, tmp_path):
    settings = {"size": 16, "cache": str(tmp_path)}
    data = load("pacs", root=str(real_data), **settings)
    again = load("folder", root=str(real_data / "PACS"), domains=list(PACS.domains), **settings)
    assert data.fingerprint() == again.fingerprint()
    assert data.classes == PACS.classes
    assert [len(domain) for domain in data.domains] == list(PACS.counts.values())
    for mine, theirs in zip(data.domains, again.domains, strict=True):
        assert torch.equal(mine.images, theirs.images)
        assert torch.equal(mine.labels, theirs.labels)
