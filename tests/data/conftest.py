"""Real and made-up data for the tests of dgavg.data."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dgavg.data import Domain, DomainDataset


@pytest.fixture(scope="session")
def real_data():
    """The folder of real data (PACS/, digits/), or a skip."""
    default = Path(__file__).resolve().parents[3] / "shared" / "data"
    path = Path(os.environ.get("DGAVG_TEST_DATA") or default)
    if not path.is_dir():
        pytest.skip(f"no real data at {path}; set DGAVG_TEST_DATA")
    return path


@pytest.fixture(autouse=True)
def _no_data_folder(monkeypatch):
    monkeypatch.delenv("DGAVG_DATA", raising=False)


@pytest.fixture
def make_data():
    """A data set of random images whose pixels tell them apart: `make_data([12, 20, 9])`."""

    def make(sizes, shape=(3, 8, 8), classes=4):
        rng = torch.Generator().manual_seed(5)
        domains = [
            Domain(
                f"domain{i}",
                torch.randint(0, 256, (n, *shape), generator=rng, dtype=torch.uint8),
                torch.randint(0, classes, (n,), generator=rng),
            )
            for i, n in enumerate(sizes)
        ]
        return DomainDataset("toy", tuple(domains), tuple("abcdefgh"[:classes]))

    return make


def idx_bytes(array):
    """An idx file of bytes, written from its description."""
    sizes = b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    return bytes((0, 0, 8, array.ndim)) + sizes + array.astype(np.uint8).tobytes()


@pytest.fixture
def write_idx():
    def write(path, array):
        path.parent.mkdir(parents=True, exist_ok=True)
        content = idx_bytes(np.asarray(array))
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
        return path

    return write


@pytest.fixture
def small_mnist(tmp_path, write_idx):
    """A folder with MNIST's four files, 60 and 30 images, some gzipped; and what is in them."""
    root, rng = tmp_path / "mnist", np.random.default_rng(3)
    images = rng.integers(0, 256, (90, 28, 28), dtype=np.uint8)
    labels = rng.integers(0, 10, 90, dtype=np.uint8)
    write_idx(root / "train-images-idx3-ubyte.gz", images[:60])
    write_idx(root / "train-labels-idx1-ubyte", labels[:60])
    write_idx(root / "t10k-images-idx3-ubyte", images[60:])
    write_idx(root / "t10k-labels-idx1-ubyte.gz", labels[60:])
    return root, images, labels


@pytest.fixture
def write_tree(tmp_path):
    """Write root/domain/class/name.png: `write_tree({"photo": {"dog": ["a.png"]}})`; gives root."""

    def write(tree, side=10):
        root, rng = tmp_path / "tree", np.random.default_rng(4)
        for domain, by_class in tree.items():
            for label, names in by_class.items():
                folder = root / domain / label
                folder.mkdir(parents=True, exist_ok=True)
                for name in names:
                    pixels = rng.integers(0, 256, (side, side + 2, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / name)
        return root

    return write
