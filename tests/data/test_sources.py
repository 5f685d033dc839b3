import numpy as np
import pytest
import torch
import torchvision
from sklearn.datasets import load_digits

from dgavg.data.sources import data_root, mnist, npz, optdigits


def test_mnist_is_the_training_file_and_then_the_test_file(small_mnist):
    root, images, labels = small_mnist
    read, digits = mnist(str(root), download=False)
    assert torch.equal(read, torch.from_numpy(images)[:, None])
    assert digits.tolist() == labels.tolist()
    assert digits.dtype == torch.int64


@pytest.mark.parametrize("place", ["digits", "MNIST/raw"])
def test_files_are_found_in_the_usual_places(small_mnist, tmp_path, monkeypatch, place):
    root, images, _ = small_mnist
    (tmp_path / "all" / place).parent.mkdir(parents=True)
    root.rename(tmp_path / "all" / place)
    monkeypatch.setenv("DGAVG_DATA", str(tmp_path / "all"))
    assert len(mnist(None, download=False)[0]) == len(images)


def test_data_root(monkeypatch):
    assert str(data_root(None)) == "data"
    monkeypatch.setenv("DGAVG_DATA", "/somewhere")
    assert str(data_root(None)) == "/somewhere"
    assert str(data_root("here")) == "here"
    assert "~" not in str(data_root("~/here"))


def test_a_missing_file(small_mnist, refuses):
    root, _, _ = small_mnist
    (root / "t10k-images-idx3-ubyte").unlink()
    with refuses("no t10k-images-idx3-ubyte or", str(root), "data.root=", "data.download=true"):
        mnist(str(root), download=False)
    with refuses("no mnist_m.npz", str(root), "(N, 32, 32, 3)", "data.root="):
        npz(str(root), "mnist_m.npz", 32, 3)


def test_download_fetches_only_what_is_missing(small_mnist, tmp_path, monkeypatch):
    root, images, _ = small_mnist
    asked = []

    def fetch(folder, download):
        asked.append((folder, download))
        (tmp_path / "new" / "MNIST").mkdir(parents=True)
        root.rename(tmp_path / "new" / "MNIST" / "raw")

    monkeypatch.setattr(torchvision.datasets, "MNIST", fetch)
    assert len(mnist(str(root), download=True)[0]) == len(images)
    assert asked == []
    assert len(mnist(str(tmp_path / "new"), download=True)[0]) == len(images)
    assert asked == [(str(tmp_path / "new"), True)]


@pytest.mark.parametrize("error", [RuntimeError("Error downloading\nmore"), OSError()])
def test_a_download_that_fails(tmp_path, monkeypatch, refuses, error):
    def fetch(folder, download):
        raise error

    monkeypatch.setattr(torchvision.datasets, "MNIST", fetch)
    reason = "Error downloading" if error.args else "OSError"
    with refuses("could not be downloaded", str(tmp_path), f"({reason})", "by hand"):
        mnist(str(tmp_path), download=True)


def test_files_that_do_not_fit_each_other(small_mnist, write_idx, refuses):
    root, images, labels = small_mnist
    write_idx(root / "train-labels-idx1-ubyte", labels[:59])
    with refuses("train-labels-idx1-ubyte", "59 labels for 60 images"):
        mnist(str(root), download=False)
    write_idx(root / "train-labels-idx1-ubyte", np.full(60, 10))
    with refuses("train-labels-idx1-ubyte", "outside 0..9"):
        mnist(str(root), download=False)
    write_idx(root / "train-images-idx3-ubyte", images[:60, :27])
    with refuses("train-images-idx3-ubyte", "(27, 28)", "28×28"):
        mnist(str(root), download=False)


def test_npz_of_grey_and_of_colour(tmp_path):
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (5, 16, 16), dtype=np.uint8)
    colour = rng.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "usps.npz", x=grey, y=np.arange(5, dtype=np.uint8))
    np.savez(tmp_path / "mnist_m.npz", x=colour, y=np.arange(5))
    images, labels = npz(str(tmp_path), "usps.npz", 16, 1)
    assert images.tolist() == grey[:, None].tolist()
    assert (labels.dtype, labels.tolist()) == (torch.int64, list(range(5)))
    assert npz(str(tmp_path), "mnist_m.npz", 32, 3)[0].tolist() == (
        colour.transpose(0, 3, 1, 2).tolist()
    )


X, Y = np.zeros((5, 16, 16), np.uint8), np.zeros(5, np.uint8)


@pytest.mark.parametrize(
    ("arrays", "parts"),
    [
        ({"x": X}, ["lacks the array 'y'", "x uint8 (N, 16, 16)"]),
        ({"y": Y}, ["lacks the array 'x'"]),
        ({"x": X.astype(float), "y": Y}, ["x float64", "x uint8 (N, 16, 16)"]),
        ({"x": X[:, :8], "y": Y}, ["(5, 8, 16)"]),
        ({"x": X, "y": Y[:, None]}, ["y uint8 (5, 1)"]),
        ({"x": X, "y": Y.astype(float)}, ["y float64"]),
        ({"x": X, "y": Y[:4]}, ["4 labels for 5 images"]),
        ({"x": X, "y": Y + 10}, ["outside 0..9"]),
        ({"x": X, "y": Y.astype(int) - 1}, ["outside 0..9"]),
        ({"x": X[:0], "y": Y[:0]}, ["no label"]),
        ({"x": np.array([{}]), "y": Y}, ["cannot be read", "allow_pickle=False"]),
    ],
)
def test_refuses_other_arrays(tmp_path, refuses, arrays, parts):
    np.savez(tmp_path / "usps.npz", **arrays)
    with refuses(str(tmp_path / "usps.npz"), *parts):
        npz(str(tmp_path), "usps.npz", 16, 1)


def test_refuses_what_is_no_npz(tmp_path, refuses):
    path = tmp_path / "usps.npz"
    np.savez_compressed(path, x=np.random.default_rng(0).integers(0, 256, X.shape, np.uint8), y=Y)
    whole = path.read_bytes()
    np.save(tmp_path / "array.npy", X)
    single = (tmp_path / "array.npy").read_bytes()
    flipped = whole[:200] + bytes(255 - b for b in whole[200:220]) + whole[220:]
    start = 30 + int.from_bytes(whole[26:28], "little") + int.from_bytes(whole[28:30], "little")
    no_deflate = whole[:start] + b"\xff" + whole[start + 1 :]
    for content in (b"", b"text", whole[:-100], whole[:50], single, flipped, no_deflate):
        path.write_bytes(content)
        with refuses(str(path), "cannot be read"):
            npz(str(tmp_path), "usps.npz", 16, 1)


def test_a_disk_that_fails(tmp_path, monkeypatch, refuses):
    def load(*_, **__):
        raise OSError("Input/output error")

    (tmp_path / "usps.npz").write_bytes(b"")
    monkeypatch.setattr(np, "load", load)
    with refuses(str(tmp_path / "usps.npz"), "Input/output error"):
        npz(str(tmp_path), "usps.npz", 16, 1)


def test_optdigits_are_scikit_learns():
    images, labels = optdigits()
    source = load_digits()
    assert images.shape == (1797, 1, 8, 8)
    assert labels.tolist() == source.target.tolist()
    assert images[:, 0].tolist() == np.round(source.images * 255 / 16).tolist()
    assert images.max() == 255
