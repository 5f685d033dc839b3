import os

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import Resize

from dgavg.data import decode as decoding
from dgavg.data import folder as module
from dgavg.data import load

TREE = {
    "sketch": {"dog": ["a.png"], "cat": ["b.png"]},
    "photo": {"dog": ["2.png", "10.png", "1.JPG"], "cat": ["x.bmp", "y.jpeg"]},
}


def as_image_folder(path, size):
    """The images (N, 3, size, size) and labels that torchvision and so DomainBed read."""
    source = ImageFolder(str(path), transform=Resize((size, size)))
    pixels = [np.asarray(image).transpose(2, 0, 1) for image, _ in source]
    return torch.from_numpy(np.stack(pixels)), source.targets, tuple(source.classes)


def test_reads_what_image_folder_reads_in_its_order(write_tree):
    root = write_tree(TREE)
    data = load("folder", root=root, size=7)
    assert data.names == ("photo", "sketch")
    assert data.classes == ("cat", "dog")
    assert data.name == "folder"
    assert data.notes == ()
    for domain in data.domains:
        images, labels, classes = as_image_folder(root / domain.name, 7)
        assert torch.equal(domain.images, images)
        assert domain.labels.tolist() == labels
        assert data.classes == classes


def test_image_extensions_are_torchvisions():
    assert module.EXTENSIONS == IMG_EXTENSIONS


def test_any_mode_becomes_rgb(write_tree):
    root = write_tree(TREE)
    grey = np.arange(100, dtype=np.uint8).reshape(10, 10)
    Image.fromarray(grey).save(root / "sketch" / "dog" / "a.png")
    Image.fromarray(np.stack([grey] * 4, 2)).save(root / "sketch" / "cat" / "b.png")
    data = load("folder", root=root, size=10)
    for image in data.domains[1].images:
        assert image.tolist() == [grey.tolist()] * 3


def test_other_files_are_passed_over(write_tree):
    root = write_tree(TREE)
    for path in (".hidden.png", "notes.txt", "photo/dog/.cached.png", "photo/dog/list.txt"):
        (root / path).write_bytes(b"no image")
    (root / "photo" / "dog" / "folder.png").mkdir()
    (root / ".git").mkdir()
    (root / "photo" / ".cache").mkdir()
    data = load("folder", root=root)
    assert [len(domain) for domain in data.domains] == [5, 2]
    assert data.input_shape == (3, 64, 64)


def test_domains_chooses_and_order_does_not_matter(write_tree):
    root = write_tree({**TREE, "art": TREE["photo"], "broken": {}})
    (root / "broken").mkdir()
    data = load("folder", root=root, domains=["sketch", "art"], title="mine")
    assert data.names == ("art", "sketch")
    assert data.name == "mine"


def test_workers_do_not_change_what_is_read(write_tree):
    root = write_tree(TREE)
    one, many = load("folder", root=root, workers=1), load("folder", root=root, workers=8)
    for a, b in zip(one.domains, many.domains, strict=True):
        assert torch.equal(a.images, b.images)


def test_workers_are_threads(write_tree, monkeypatch):
    root, asked = write_tree(TREE), []

    class Pool(decoding.ThreadPoolExecutor):
        def __init__(self, workers):
            asked.append(workers)
            super().__init__(workers)

    monkeypatch.setattr(decoding, "ThreadPoolExecutor", Pool)
    load("folder", root=root, cache="none")
    load("folder", root=root, workers=3, cache="none")
    assert asked == [os.cpu_count(), 3]


def test_missing_and_empty_roots(tmp_path, refuses):
    with refuses(f"no folder {tmp_path / 'none'}", "data.root=FOLDER", "FOLDER/domain/class/image"):
        load("folder", root=tmp_path / "none")
    (tmp_path / "file.png").write_bytes(b"")
    with refuses(f"no folder {tmp_path / 'file.png'}"):
        load("folder", root=tmp_path / "file.png")
    with refuses(f"{tmp_path} has no folder for a domain", "data.root=FOLDER"):
        load("folder", root=tmp_path)


def test_a_domain_without_classes_suggests_the_others(write_tree, refuses):
    root = write_tree(TREE)
    (root / "splits").mkdir()
    (root / "splits" / "train.txt").write_text("photo/dog/a.png 1")
    with refuses(str(root / "splits"), "write data.domains=[photo,sketch]"):
        load("folder", root=root)
    with refuses(str(root / "photo" / "cat"), "no folder for a class", "data.root=FOLDER"):
        load("folder", root=root / "photo")


def test_unknown_and_no_domains(write_tree, refuses):
    root = write_tree(TREE)
    with refuses("no domain 'photos'", "did you mean 'photo'", str(root)):
        load("folder", root=root, domains=["photos", "sketch"])
    with refuses("data.domains=[]", "photo, sketch"):
        load("folder", root=root, domains=[])
    with refuses("has 1 domain(s) (photo)"):
        load("folder", root=root, domains=["photo"])


def test_a_class_that_a_domain_lacks(write_tree, refuses):
    root = write_tree({**TREE, "art": {"dog": ["a.png"]}})
    with refuses("domain 'art' has no image of class 'cat'", str(root / "art" / "cat")):
        load("folder", root=root)
    (root / "art" / "cat").mkdir()
    (root / "art" / "cat" / "notes.txt").write_text("none yet")
    with refuses("domain 'art' has no image of class 'cat'", "data.domains="):
        load("folder", root=root)
    assert load("folder", root=root, domains=["photo", "sketch"]).names == ("photo", "sketch")


def test_bad_settings(write_tree, refuses):
    root = write_tree(TREE)
    with refuses("'skipp'", "did you mean 'skip'", "data.on_bad_image"):
        load("folder", root=root, on_bad_image="skipp")
    with refuses("data.size=0"):
        load("folder", root=root, size=0)
    with refuses("data.workers=-1"):
        load("folder", root=root, workers=-1)
    with refuses("data.size=1000000", "GiB", "smaller"):
        load("folder", root=root, size=1_000_000, cache="none")
    with refuses(str(root), "GiB", "smaller data.size"):
        load("folder", root=root, size=1_000_000)


def truncate(path):
    """Cut a file in half: its header still reads."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_an_unreadable_image_is_named(write_tree, refuses):
    root = write_tree(TREE)
    truncate(root / "photo" / "dog" / "2.png")
    with refuses(str(root / "photo" / "dog" / "2.png"), "data.on_bad_image=skip"):
        load("folder", root=root)
    (root / "photo" / "dog" / "2.png").write_bytes(b"")
    with refuses(str(root / "photo" / "dog" / "2.png"), "cannot be read"):
        load("folder", root=root)


def test_the_rest_is_not_decoded_after_an_error(write_tree, refuses, monkeypatch):
    root = write_tree(
        {**TREE, "photo": {"dog": [f"{i:03}.png" for i in range(300)], "cat": ["a.png"]}}
    )
    truncate(root / "photo" / "cat" / "a.png")
    decoded, decode = [], decoding.decode

    def count(path, out):
        decoded.append(path)
        return decode(path, out)

    monkeypatch.setattr(decoding, "decode", count)
    with refuses("a.png"):
        load("folder", root=root, workers=1)
    assert len(decoded) < 250


def test_skip_leaves_out_counts_and_lists(write_tree):
    names = [f"{i}.png" for i in range(8)]
    root = write_tree({"photo": {"cat": names, "dog": names}, "sketch": TREE["sketch"]})
    before = load("folder", root=root).domains[0]
    truncate(root / "photo" / "cat" / "3.png")
    data = load("folder", root=root, on_bad_image="skip")
    assert data.notes == ("left out 1 unreadable image(s) (photo 1): photo/cat/3.png",)
    keep = [i for i in range(16) if i != 3]
    assert torch.equal(data.domains[0].images, before.images[keep])
    assert torch.equal(data.domains[0].labels, before.labels[keep])
    for i in range(7):
        (root / "photo" / "dog" / f"{i}.png").write_bytes(b"no image")
    (note,) = load("folder", root=root, on_bad_image="skip").notes
    assert note == (
        "left out 8 unreadable image(s) (photo 8): photo/cat/3.png, photo/dog/0.png, "
        "photo/dog/1.png, photo/dog/2.png, photo/dog/3.png, 3 more"
    )


def test_skip_must_leave_something_of_each_class(write_tree, refuses):
    root = write_tree(TREE)
    truncate(root / "sketch" / "dog" / "a.png")
    with refuses("none of the 1 images of class 'dog' of domain 'sketch'", "sketch/dog"):
        load("folder", root=root, on_bad_image="skip")


def test_real_pacs(real_data, refuses):
    root = real_data / "PACS"
    with refuses("splits", "write data.domains=[art_painting,cartoon,photo,sketch]"):
        load("folder", root=root)


@pytest.mark.slow
def test_real_pacs_is_what_image_folder_reads(real_data, tmp_path):
    root = real_data / "PACS"
    domains = ["art_painting", "cartoon", "photo", "sketch"]
    place = str(tmp_path)  # real data are left as they are
    data = load("folder", root=root, domains=domains, size=32, title="pacs", cache=place)
    assert [len(domain) for domain in data.domains] == [2048, 2344, 1670, 3929]
    assert data.classes == ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
    images, labels, _ = as_image_folder(root / "photo", 32)
    assert torch.equal(data.domains[2].images, images)
    assert data.domains[2].labels.tolist() == labels


def test_a_tilde_is_the_home(write_tree, monkeypatch):
    root = write_tree(TREE)
    monkeypatch.setenv("HOME", str(root.parent))
    data = load("folder", root="~/tree", cache="~/decoded")
    assert data.names == ("photo", "sketch")
    assert (root.parent / "decoded").is_dir()
