"""Spawrious on a small tree of its real layout: 0/place/breed/image and 1/place/breed/image."""

from collections import Counter

import pytest
from PIL import Image

from dgavg.data import load
from dgavg.data.spawrious import CLASSES, IMAGES, VARIANTS, combined

PLACES = ("beach", "desert", "dirt", "jungle", "mountain", "snow")
SETTINGS = {"size": 2, "cache": "none", "workers": 1}


@pytest.fixture
def plant(tmp_path):
    """Write the whole tree with `each` images in a folder; gives the folder above."""

    def write(each=3, real=True):
        for group in "01":
            for place in PLACES:
                for breed in CLASSES:
                    folder = tmp_path / "spawrious224" / group / place / breed
                    folder.mkdir(parents=True)
                    for i in range(each):
                        path = folder / f"img_{i:04}.png"
                        if real:
                            Image.new("RGB", (3, 3)).save(path)
                        else:
                            path.touch()
        return tmp_path

    return write


def where(tree, root):
    """Domain → class → how many images of each folder."""
    found = {}
    for domain, by_class in tree.items():
        for breed, files in by_class.items():
            for path in files:
                group, place, folder, _ = path.relative_to(root).parts
                assert folder == breed
                found.setdefault(domain, {}).setdefault(breed, Counter())[group, place] += 1
    return found


@pytest.mark.parametrize(
    ("variant", "own", "test", "rest"),
    [
        ("o2o_easy", "desert jungle dirt snow", "dirt snow desert jungle", "beach"),
        ("o2o_medium", "mountain beach dirt jungle", "jungle dirt beach snow", "desert"),
        ("o2o_hard", "jungle mountain snow desert", "mountain snow desert jungle", "beach"),
    ],
)
def test_one_to_one(plant, variant, own, test, rest):
    """97 % and 87 % of a breed at its place, the rest at one place; the test has all at another."""
    root = plant(each=20, real=False) / "spawrious224"
    found = where(combined(root, variant, check=False), root)
    assert list(found) == ["Test", "SC_group_1", "SC_group_2"]
    order = ("bulldog", "dachshund", "labrador", "corgi")
    for breed, mine, other in zip(order, own.split(), test.split(), strict=True):
        assert found["SC_group_1"][breed] == {("0", mine): 19, ("0", rest): 1}
        assert found["SC_group_2"][breed] == {("1", mine): 17, ("1", rest): 3}
        assert found["Test"][breed] == {("0", other): 20, ("1", other): 20}


@pytest.mark.parametrize(
    ("variant", "own", "test"),
    [
        ("m2m_easy", "desert mountain dirt jungle", "dirt jungle mountain desert"),
        ("m2m_medium", "beach snow mountain desert", "desert mountain beach snow"),
        ("m2m_hard", "dirt jungle snow beach", "snow beach dirt jungle"),
    ],
)
def test_many_to_many(plant, variant, own, test):
    """Two breeds change places from one training domain to the other; so they do in the test."""
    root = plant(each=4, real=False) / "spawrious224"
    found = where(combined(root, variant, check=False), root)
    a, b, c, d = own.split()
    w, x, y, z = test.split()
    for breed, first, second, tests in (
        ("bulldog", a, b, (w, x)),
        ("dachshund", b, a, (w, x)),
        ("labrador", c, d, (y, z)),
        ("corgi", d, c, (y, z)),
    ):
        assert found["SC_group_1"][breed] == {("0", first): 4}
        assert found["SC_group_2"][breed] == {("0", second): 4}
        assert found["Test"][breed] == {("0", place): 4 for place in tests}


def test_whole_spawrious_has_the_papers_counts(plant, monkeypatch):
    """3168 images a folder; the same shares on fewer, since the counts are those of the code."""
    assert IMAGES == 3168
    assert int(0.97 * IMAGES) == 3072
    assert int(0.87 * IMAGES) == 2756
    root = plant(each=32, real=False) / "spawrious224"
    monkeypatch.setattr("dgavg.data.spawrious.IMAGES", 32)
    for variant in VARIANTS:
        tree = combined(root, variant, check=True)
        sizes = [sum(map(len, by_class.values())) for by_class in tree.values()]
        assert sizes == [2 * 4 * 32, 4 * 32, 4 * 32]


def test_is_found_and_loaded(plant, monkeypatch):
    root = plant()
    data = load("spawrious", root=str(root), check=False, **SETTINGS)
    assert data.name == "spawrious_o2o_easy"
    assert data.names == ("Test", "SC_group_1", "SC_group_2")
    assert data.classes == CLASSES
    assert [len(domain) for domain in data.domains] == [24, 12, 12]
    assert data.domains[1].labels.bincount().tolist() == [3, 3, 3, 3]
    again = load("spawrious", root=str(root / "spawrious224"), check=False, **SETTINGS)
    assert again.domains[1].files == data.domains[1].files
    monkeypatch.setenv("DGAVG_DATA", str(root))
    hard = load("spawrious", variant="m2m_hard", check=False, **SETTINGS)
    assert hard.name == "spawrious_m2m_hard"


def test_what_is_missing(plant, tmp_path, refuses):
    with refuses(f"no Spawrious in {tmp_path}", "data.root=FOLDER", "data.download=true"):
        load("spawrious", root=str(tmp_path))
    root = plant()
    with refuses("no data.variant 'o2o_esy'", "did you mean 'o2o_easy'"):
        load("spawrious", root=str(root), variant="o2o_esy")
    with refuses("has 3 images, not 3168", "data.check=false"):
        load("spawrious", root=str(root), **SETTINGS)
    folder = root / "spawrious224" / "1" / "beach" / "corgi"
    for path in folder.iterdir():
        path.unlink()
    with refuses("no image in", str(folder)):
        load("spawrious", root=str(root), check=False, **SETTINGS)
    folder.rmdir()
    with refuses("lacks", str(folder)):
        load("spawrious", root=str(root), check=False, **SETTINGS)
    assert load("spawrious", variant="m2m_easy", root=str(root), check=False, **SETTINGS)
