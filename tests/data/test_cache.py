import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dgavg.data import cache, digests, load
from dgavg.data import decode as decoding

TREE = {
    "photo": {"cat": ["1.png", "2.jpg", "3.png"], "dog": ["a.bmp", "b.png"]},
    "sketch": {"cat": ["x.png"], "dog": ["y.jpeg", "z.png"]},
}
SIZE = 7


@pytest.fixture
def root(write_tree):
    return write_tree(TREE, side=40)


@pytest.fixture
def decoded(monkeypatch):
    """The names of the files that are decoded from now on."""
    seen, decode = [], decoding.decode

    def count(path, out):
        seen.append(path.name)
        return decode(path, out)

    monkeypatch.setattr(decoding, "decode", count)
    return seen


@pytest.fixture
def hashed(monkeypatch):
    """The names of the files whose contents are read for a digest from now on; none is fresh."""
    seen, digest = [], digests._digest

    def count(path):
        seen.append(path.name)
        return digest(path)

    monkeypatch.setattr(digests, "_digest", count)
    monkeypatch.setattr(digests, "FRESH", 0)
    return seen


def read(root, **settings):
    return load("folder", root=str(root), **{"size": SIZE, **settings})


def same(a, b):
    return (a.names, a.classes) == (b.names, b.classes) and all(
        torch.equal(x.images, y.images) and torch.equal(x.labels, y.labels) and x.files == y.files
        for x, y in zip(a.domains, b.domains, strict=True)
    )


def files(root, kind="*.images"):
    return sorted((root / cache.FOLDER).glob(kind))


def test_the_cache_holds_what_is_read_without_it(root, decoded):
    plain = read(root, cache="none")
    assert not (root / cache.FOLDER).exists()
    first = read(root)
    assert len(decoded) == 16
    again = read(root)
    assert len(decoded) == 16
    assert same(plain, first)
    assert same(plain, again)
    assert plain.content is None
    assert plain.fingerprint() == first.fingerprint() == again.fingerprint() == again.content
    assert [domain.files for domain in again.domains] == [
        tuple(f"{domain}/{label}/{name}" for label, names in part.items() for name in names)
        for domain, part in TREE.items()
    ]
    assert len(files(root)) == 1
    assert not files(root, "*.part")


def test_the_hash_kept_is_of_the_pixels(root):
    content = read(root).content
    changed = read(root, cache="none")
    changed.domains[0].images[0, 0, 0, 0] += 1
    assert changed.fingerprint() != content


def test_another_folder_and_another_place_share_it(root, tmp_path, decoded, hashed):
    place = tmp_path / "far" / "away"
    first = read(root, cache=str(place))
    assert not (root / cache.FOLDER).exists()
    shutil.copytree(root, tmp_path / "copy")
    second = read(tmp_path / "copy", cache=str(place))
    assert len(decoded) == 8
    assert same(first, second)
    assert len(list(place.glob("*.images"))) == 1
    assert len(list(place.glob("index-*.json"))) == 2


@pytest.mark.parametrize("change", ["size", "pixels", "name", "class", "domains", "decoder"])
def test_what_the_pixels_come_from_is_in_the_key(root, decoded, monkeypatch, change):
    before, settings = read(root), {}
    decoded.clear()
    if change == "size":
        settings["size"] = SIZE + 1
    elif change == "pixels":
        Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(root / "photo/cat/1.png")
    elif change == "name":
        (root / "photo/cat/3.png").rename(root / "photo/cat/0.png")
    elif change == "class":
        for domain in TREE:
            (root / domain / "cat").rename(root / domain / "cow")
    elif change == "domains":
        shutil.copytree(root / "photo", root / "art")
    else:
        monkeypatch.setattr(decoding, "pillow", "0.1")
    after = read(root, **settings)
    assert decoded
    assert len(files(root)) == 2
    assert same(after, read(root, cache="none", **settings))
    assert same(before, after) == (change == "decoder")


def test_unchanged_files_are_not_read_again(root, hashed):
    read(root)
    assert len(hashed) == 8
    hashed.clear()
    read(root)
    assert hashed == []
    os.utime(root / "photo/cat/1.png")
    read(root)
    assert hashed == ["1.png"]
    assert len(files(root)) == 1  # its content is the same


def test_a_change_that_hides_behind_an_old_date_is_seen(root, hashed):
    path = root / "photo/cat/1.png"
    before = path.stat()
    first = read(root)
    content = bytearray(path.read_bytes())
    other = (root / "photo/cat/3.png").read_bytes()
    path.write_bytes(other)
    os.truncate(path, len(content)) if len(other) > len(content) else None
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    hashed.clear()
    second = read(root, on_bad_image="skip")
    assert hashed == ["1.png"]
    assert second.content != first.content


def test_a_fresh_file_is_not_remembered(root, hashed, monkeypatch):
    monkeypatch.setattr(digests, "FRESH", 10**12)
    read(root)
    hashed.clear()
    read(root)
    assert len(hashed) == 8


def test_the_index_of_some_domains_keeps_the_others(root, hashed):
    shutil.copytree(root / "photo", root / "art")
    read(root)
    os.utime(root / "photo/cat/1.png")
    read(root, domains=["art", "photo"])
    hashed.clear()
    read(root)
    assert hashed == []


@pytest.mark.parametrize("content", [b"", b"no json", b"[1]", b'{"format": "x", "files": {}}'])
def test_a_damaged_index_is_made_anew(root, hashed, content):
    expected = read(root)
    (index,) = files(root, "index-*.json")
    whole = index.read_bytes()
    for damaged in (content, whole.replace(b'"photo/cat/1.png": [', b'"photo/cat/1.png": [[], ')):
        index.write_bytes(damaged)
        hashed.clear()
        assert same(read(root), expected)
        assert len(hashed) == 8
        assert index.read_bytes() == whole


def truncated(path):
    os.truncate(path, path.stat().st_size - 1)


def half(path):
    os.truncate(path, path.stat().st_size // 2)


def without_pixels(path):
    tail = path.read_bytes()[8 * 3 * SIZE**2 :]
    path.write_bytes(tail)


def of_others(path):
    path.write_bytes(path.read_bytes().replace(path.stem.encode(), b"0" * len(path.stem)))


def unmarked(path):
    path.write_bytes(path.read_bytes()[: -len(cache.MAGIC)] + b"another format 1")


@pytest.mark.parametrize(
    "damage",
    [
        truncated,
        half,
        without_pixels,
        of_others,
        unmarked,
        lambda path: path.write_bytes(b"more" + path.read_bytes()),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(os.urandom(5000)),
        lambda path: path.write_bytes(bytes(5000)),
    ],
)
def test_a_damaged_cache_is_built_again(root, decoded, damage):
    expected = read(root, cache="none")
    read(root)
    (path,) = files(root)
    damage(path)
    decoded.clear()
    assert same(read(root), expected)
    assert len(decoded) == 8
    read(root)
    assert len(decoded) == 8


def test_nobody_can_damage_it_through_its_images(root):
    data = read(root)
    (path,) = files(root)
    before, pixels = path.read_bytes(), data.domains[0].images.clone()
    data.domains[0].images.fill_(7)
    assert path.read_bytes() == before
    assert torch.equal(read(root).domains[0].images, pixels)


@pytest.mark.skipif(sys.platform != "linux", reason="the file system may not have sparse files")
def test_it_may_be_larger_than_memory(tmp_path):
    """2 TiB, nearly all of them holes."""
    rows = 2**41 // (3 * 224**2)
    with (tmp_path / "large").open("wb+") as file:
        file.truncate(rows * 3 * 224**2)
        file.seek(-1, os.SEEK_END)
        file.write(b"\7")
        file.flush()
        images = cache._images(file.fileno(), rows, 224)
        assert images.shape == (rows, 3, 224, 224)
        assert images[-1, -1, -1, -1] == 7
        assert images[1, 0, 0, 0] == 0


# Images that can't be read.


def break_some(root):
    half(root / "photo/cat/2.jpg")
    (root / "photo/dog/b.png").write_bytes(b"")
    (root / "sketch/dog/z.png").write_bytes(b"no image")
    return [("photo", [1, 4]), ("sketch", [2])]


def test_bad_images_are_left_out_and_listed_each_time(root, decoded):
    whole = read(root, cache="none")
    broken = dict(break_some(root))
    decoded.clear()
    found = [read(root, on_bad_image="skip") for _ in range(2)]
    assert len(decoded) == 8
    plain = read(root, on_bad_image="skip", cache="none")
    for data in found:
        assert same(data, plain)
        assert data.notes == plain.notes
        assert data.fingerprint() == plain.fingerprint()
        (note,) = data.notes
        assert note == (
            "left out 3 unreadable image(s) (photo 2, sketch 1): "
            "photo/cat/2.jpg, photo/dog/b.png, sketch/dog/z.png"
        )
        for domain, before in zip(data.domains, whole.domains, strict=True):
            keep = [i for i in range(len(before)) if i not in broken[domain.name]]
            assert torch.equal(domain.images, before.images[keep])
            assert torch.equal(domain.labels, before.labels[keep])


def test_a_cache_without_them_does_not_hide_them(root, refuses):
    break_some(root)
    read(root, on_bad_image="skip")
    with refuses(str(root / "photo/cat/2.jpg"), "truncated", "data.on_bad_image=skip"):
        read(root)


@pytest.mark.parametrize(
    ("damage", "why"),
    [(half, "truncated"), (lambda p: p.write_bytes(b""), "identify"), (Path.unlink, "")],
)
def test_a_bad_image_leaves_no_cache(root, refuses, damage, why, monkeypatch):
    path, stamps = root / "photo/cat/2.jpg", digests.stamps
    if not why:  # it goes while the others are read
        monkeypatch.setattr(cache, "stamps", lambda *a: (path.unlink(missing_ok=True), stamps(*a)))
        why = "No such file"
    else:
        damage(path)
    with refuses(str(path), "cannot be read", why):
        read(root)
    assert not files(root, "*.images")
    assert not files(root, "*.part")


def test_a_class_without_a_readable_image_leaves_no_cache(root, refuses):
    half(root / "sketch/cat/x.png")
    with refuses("none of the 1 images of class 'cat' of domain 'sketch'"):
        read(root, on_bad_image="skip")
    assert not files(root, "*.images")
    assert not files(root, "*.part")


def test_no_readable_image_at_all(root, refuses):
    for path in root.rglob("*.*"):
        path.write_bytes(b"")
    with refuses("none of the 3 images of class 'cat' of domain 'photo'"):
        read(root, on_bad_image="skip")


def test_images_that_change_meanwhile(root, refuses, monkeypatch):
    decode = decoding.decode

    def change(path, out):
        os.utime(root / "photo/cat/1.png", ns=(1, 1))
        return decode(path, out)

    monkeypatch.setattr(decoding, "decode", change)
    with refuses(f"images in {root} changed", "start again"):
        read(root)
    assert not files(root)
    assert not files(root, "*.part")
