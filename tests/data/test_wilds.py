"""WILDS through its own package, on small folders of their real layouts."""

import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from dgavg.data import load

if find_spec("wilds") is None:  # not imported here: it would ask PyPI for newer versions
    pytest.skip("needs the package wilds", allow_module_level=True)
SETTINGS = {"size": 4, "cache": "none", "workers": 1}


def picture(path, grey):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 6), (grey, grey, grey)).save(path)


@pytest.fixture
def camelyon(tmp_path):
    """Ten patches of five hospitals, in mixed order; gives the folder above and the metadata."""
    root = tmp_path / "camelyon17_v1.0"
    root.mkdir()
    (root / "RELEASE_v1.0.txt").touch()
    rows = [(7 * i % 5, i % 2, i * 20) for i in range(10)]  # hospital, tumor, grey
    lines = [",patient,node,x_coord,y_coord,tumor,slide,center,split"]
    for i, (hospital, tumor, grey) in enumerate(rows):
        name = f"patient_{hospital:03}_node_1"
        picture(root / "patches" / name / f"patch_{name}_x_{i}_y_{i}.png", grey)
        lines.append(f"{i},{hospital:03},1,{i},{i},{tumor},{hospital},{hospital},0")
    (root / "metadata.csv").write_text("\n".join(lines) + "\n")
    return tmp_path, np.array(rows)


@pytest.fixture
def fmow(tmp_path):
    """Images of three regions, one of them held back by its publishers ("seq")."""
    root = tmp_path / "fmow_v1.1"
    root.mkdir()
    (root / "RELEASE_v1.1.txt").touch()
    (root / "country_code_mapping.csv").write_text("alpha-3,region\nFRA,Europe\nKEN,Africa\n")
    rows = [
        ("train", "KEN", "airport", 10),
        ("seq", "FRA", "zoo", 20),
        ("val", "FRA", "zoo", 30),
        ("test", "XYZ", "barn", 40),
        ("train", "KEN", "zoo", 50),
        *(("train", "FRA", "dam", 60 + i) for i in range(100)),
    ]
    lines = ["split,country_code,category,timestamp"]
    for i, (split, country, kind, grey) in enumerate(rows):
        picture(root / "images" / f"rgb_img_{i}.png", grey)
        lines.append(f"{split},{country},{kind},2012-03-0{i % 9 + 1}T10:00:00Z")
    (root / "rgb_metadata.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def greys(domain):
    return domain.images[:, 0, 0, 0].tolist()


def test_camelyon_has_a_domain_for_each_hospital(camelyon):
    root, rows = camelyon
    data = load("camelyon17", root=str(root), **SETTINGS)
    assert data.name == "camelyon17"
    assert data.names == tuple(f"hospital_{i}" for i in range(5))
    assert data.classes == ("normal", "tumor")
    assert data.input_shape == (3, 4, 4)
    for i, domain in enumerate(data.domains):
        mine = rows[rows[:, 0] == i]
        assert greys(domain) == mine[:, 2].tolist()
        assert domain.labels.tolist() == mine[:, 1].tolist()
    (note,) = data.notes
    assert "10 images, where 455954 are usual" in note


def test_images_and_labels_are_part_of_the_content(camelyon):
    root, _ = camelyon
    first = load("camelyon17", root=str(root), **SETTINGS).fingerprint()
    assert load("camelyon17", root=str(root), **SETTINGS).fingerprint() == first
    picture(next(root.glob("*/patches/*/*_x_7_y_7.png")), 255)
    second = load("camelyon17", root=str(root), **SETTINGS).fingerprint()
    assert second != first
    table = root / "camelyon17_v1.0" / "metadata.csv"
    table.write_text(table.read_text().replace("0,000,1,0,0,0,", "0,000,1,0,0,1,", 1))
    assert load("camelyon17", root=str(root), **SETTINGS).fingerprint() not in (first, second)


def test_an_unreadable_patch(camelyon, refuses):
    root, rows = camelyon
    (bad,) = root.glob("*/patches/*/*_x_7_y_7.png")
    bad.write_bytes(b"")
    with refuses(str(bad), "data.on_bad_image=skip"):
        load("camelyon17", root=str(root), **SETTINGS)
    data = load("camelyon17", root=str(root), on_bad_image="skip", **SETTINGS)
    hospital = rows[7, 0]
    left = [i for i in np.flatnonzero(rows[:, 0] == hospital) if i != 7]
    assert greys(data.domains[hospital]) == rows[left, 2].tolist()
    assert data.domains[hospital].labels.tolist() == rows[left, 1].tolist()


def test_fmow_has_a_domain_for_each_region(fmow):
    data = load("fmow", root=str(fmow), **SETTINGS)
    assert data.names == ("Africa", "Europe", "Other")
    assert len(data.classes) == 62
    assert greys(data.domains[0]) == [10, 50]
    assert greys(data.domains[1]) == [30, *range(60, 160)]
    assert greys(data.domains[2]) == [40]
    named = [data.classes[i] for i in data.domains[0].labels.tolist()]
    assert named == ["airport", "zoo"]
    assert data.domains[0].labels.dtype == torch.int64


def test_what_is_missing(tmp_path, refuses, monkeypatch):
    with refuses(f"no camelyon17_v1.0 in {tmp_path}", "data.download=true", "data.root=FOLDER"):
        load("camelyon17", root=str(tmp_path))
    with refuses(f"no fmow_v1.1 in {tmp_path}"):
        load("fmow", root=str(tmp_path))
    (tmp_path / "fmow_v1.1").mkdir()
    (tmp_path / "fmow_v1.1" / "RELEASE_v1.1.txt").touch()
    with refuses("fmow_v1.1 in", "can't be opened", "rgb_metadata.csv", "data.root=FOLDER"):
        load("fmow", root=str(tmp_path))
    monkeypatch.setitem(sys.modules, "wilds.datasets.fmow_dataset", None)
    with refuses("data=fmow needs the package wilds", "pip install 'dgavg[wilds]'"):
        load("fmow", root=str(tmp_path))
