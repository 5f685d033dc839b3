"""Hugging Face data sets that the test saves to disk, read without the network."""

import io
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from dgavg.data import load

datasets = pytest.importorskip("datasets")


def picture(seed, size=(9, 7), mode="RGB"):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


PICTURES = [picture(i, size=(9, 7 + i), mode="L" if i == 3 else "RGB") for i in range(8)]
STYLES = ["photo", "art", "photo", "art", "photo", "photo", "art", "art"]
KINDS = [1, 0, 0, 2, 2, 1, 1, 0]


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def save(tmp_path):
    """Save a data set of the pictures above with other columns or features; gives its folder."""

    def one(features=None, split=None, **others):
        columns = {"image": [encoded(p) for p in PICTURES], "label": KINDS, "domain": STYLES}
        columns |= others
        kinds = {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog", "cow", "fox"]),
            "domain": datasets.Value("string"),
        } | (features or {})
        made = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
        path = tmp_path / "saved"
        (datasets.DatasetDict({split: made}) if split else made).save_to_disk(str(path))
        return str(path)

    return one


def expected(rows, size):
    images = [
        np.asarray(PICTURES[i].convert("RGB").resize((size, size), Image.Resampling.BILINEAR))
        for i in rows
    ]
    return torch.from_numpy(np.stack(images)).movedim(-1, 1)


def test_images_labels_and_domains_of_the_columns(save):
    data = load("hub", dataset=save(), size=6, workers=2)
    assert data.name == "saved"
    assert data.names == ("art", "photo")
    assert data.classes == ("cat", "dog", "cow", "fox")
    assert data.notes == ()
    for domain in data.domains:
        rows = [i for i, style in enumerate(STYLES) if style == domain.name]
        assert torch.equal(domain.images, expected(rows, 6))
        assert domain.labels.tolist() == [KINDS[i] for i in rows]


def test_class_labels_keep_their_order_and_texts_are_sorted(save):
    path = save(
        {"domain": datasets.ClassLabel(names=["photo", "art", "none"]),
         "label": datasets.Value("string")},
        domain=[["photo", "art"].index(style) for style in STYLES],
        label=[["dog", "cow", "cat"][k] for k in KINDS],
    )  # fmt: skip
    data = load("hub", dataset=path, size=4)
    assert data.names == ("photo", "art")
    assert data.classes == ("cat", "cow", "dog")
    assert data.domains[0].labels.tolist() == [1, 2, 0, 1]


def test_integers_are_sorted_as_numbers(save):
    path = save(
        {"domain": datasets.Value("int32"), "label": datasets.Value("int64")},
        domain=[10 if style == "art" else 9 for style in STYLES],
        label=[k * 5 for k in KINDS],
    )
    data = load("hub", dataset=path, size=4)
    assert data.names == ("9", "10")
    assert data.classes == ("0", "5", "10")


def test_columns_splits_and_title_are_settings(save):
    path = save(
        {"pic": datasets.Image(), "kind": datasets.Value("string"), "from": datasets.Value("int8")},
        split="test",
        pic=[encoded(p) for p in reversed(PICTURES)],
        kind=list("xyxyxyxy"),
        **{"from": [0, 1] * 4},
    )
    settings = {"image": "pic", "label": "kind", "domain": "from", "size": 5, "title": "mine"}
    data = load("hub", dataset=path, split="test", **settings)
    assert (data.name, data.names, data.classes) == ("mine", ("0", "1"), ("x", "y"))
    assert torch.equal(data.domains[0].images, expected([7, 5, 3, 1], 5))


def test_a_folder_of_images_and_a_table(tmp_path):
    """The form that `load_dataset` calls imagefolder: here images are files, not bytes."""
    folder = tmp_path / "beside"
    folder.mkdir()
    lines = []
    for i, p in enumerate(PICTURES):
        p.save(folder / f"{i}.png")
        row = {"file_name": f"{i}.png", "kind": KINDS[i], "style": STYLES[i]}
        lines.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    data = load("hub", dataset=str(folder), label="kind", domain="style", size=6)
    assert data.name == "beside"
    assert torch.equal(data.domains[0].images, expected([1, 3, 6, 7], 6))
    assert data.domains[0].labels.tolist() == [KINDS[i] for i in (1, 3, 6, 7)]


def test_an_image_that_cannot_be_read(save, refuses):
    cells = [encoded(p) for p in PICTURES]
    cells[2]["bytes"] = cells[2]["bytes"][:60]
    cells[5] = None
    path = save(image=cells)
    with refuses("row 2 of", "cannot be read", "data.on_bad_image=skip"):
        load("hub", dataset=path, size=4)
    data = load("hub", dataset=path, size=4, on_bad_image="skip")
    assert data.notes == ("left out 2 unreadable image(s), row(s) 2, 5",)
    assert [len(domain) for domain in data.domains] == [4, 2]
    assert torch.equal(data.domains[1].images, expected([0, 4], 4))
    assert data.domains[1].labels.tolist() == [1, 2]
    path = save(image=[None if style == "art" else cells[0] for style in STYLES])
    with refuses("no image of domain 'art' can be read"):
        load("hub", dataset=path, size=4, on_bad_image="skip")


def test_what_is_not_there(save, refuses, tmp_path):
    path = save(split="train")
    with refuses("no column 'lable' in", "data.label", "did you mean 'label'"):
        load("hub", dataset=path, label="lable")
    with refuses("no split 'tran'", "did you mean 'train'"):
        load("hub", dataset=path, split="tran")
    (tmp_path / "empty").mkdir()
    with refuses("empty", "can't be opened", "save_to_disk"):
        load("hub", dataset=str(tmp_path / "empty"))
    with refuses("data set 'no-one/nothing-here'", "can't be opened", "data.dataset"):
        load("hub", dataset="no-one/nothing-here")


def test_columns_of_another_kind(save, refuses):
    with refuses("column 'domain'", "no column of images", "data.image"):
        load("hub", dataset=save(), image="domain", size=4)
    path = save({"label": datasets.Value("float32")}, label=[0.5] * 8)
    with refuses("column 'label'", "texts or integers", "data.label"):
        load("hub", dataset=path, size=4)
    path = save(label=[-1, *KINDS[1:]])
    with refuses("column 'label'", "without a label (-1)"):
        load("hub", dataset=path, size=4)
    with refuses("has 1 domain(s)"):
        load("hub", dataset=save(domain=["one"] * 8), size=4)


def test_wrong_settings(save, refuses):
    path = save()
    with refuses("no data.on_bad_image 'skipp'"):
        load("hub", dataset=path, on_bad_image="skipp")
    with refuses("data.size=0"):
        load("hub", dataset=path, size=0)
    with refuses("data.size=1000000", "don't fit into memory"):
        load("hub", dataset=path, size=1_000_000)
    with refuses("data.workers=-1"):
        load("hub", dataset=path, workers=-1)


def test_without_the_package(refuses, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with refuses("pip install 'dgavg[hub]'"):
        load("hub", dataset="any")
