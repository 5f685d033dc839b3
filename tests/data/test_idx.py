import gzip

import numpy as np
import pytest
import torch

from dgavg.data.idx import read_idx


@pytest.mark.parametrize("name", ["images", "images.gz"])
def test_reads_what_was_written(tmp_path, write_idx, name):
    array = np.arange(2 * 3 * 5).reshape(2, 3, 5)
    read = read_idx(write_idx(tmp_path / name, array), 3)
    assert read.dtype == torch.uint8
    assert read.tolist() == array.tolist()


def test_reads_large_sizes_as_big_endian(tmp_path, write_idx):
    assert read_idx(write_idx(tmp_path / "labels", np.arange(300) % 10), 1).shape == (300,)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda b: b[:-1], ["holds 29 values", "(2, 3, 5)", "cut short"]),
        (lambda b: b + b"x", ["holds 31 values", "(2, 3, 5)"]),
        (lambda b: b[:10], ["no idx file", "3 dimension(s)"]),
        (lambda b: b"", ["no idx file", "nothing"]),
        (lambda b: b"\x00\x00\x0d" + b[3:], ["00 00 0d 03, not 00 00 08 03"]),
        (lambda b: b"\x01" + b[1:], ["01 00 08 03"]),
        (lambda b: b[:4] + b"\xff" * 4 + b[8:], ["holds 30 values", "damaged"]),
        (lambda b: b[:4] + b"\xff\xff\xff\xfe\xff\xff\xff\xfd" + b[12:], ["(-2, -3, 5)"]),
    ],
)
def test_refuses_a_damaged_or_foreign_file(tmp_path, write_idx, refuses, change, parts):
    path = write_idx(tmp_path / "images", np.zeros((2, 3, 5)))
    path.write_bytes(change(path.read_bytes()))
    with refuses(str(path), *parts):
        read_idx(path, 3)


def test_refuses_labels_where_images_are_due(tmp_path, write_idx, refuses):
    path = write_idx(tmp_path / "labels", np.zeros(4))
    with refuses(str(path), "3 dimension(s)", "00 00 08 01"):
        read_idx(path, 3)


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-9], lambda b: b"no gzip", lambda b: b[:12] + b"\xff" * 9 + b[21:]]
)
def test_refuses_a_damaged_gzip(tmp_path, refuses, damage):
    path = tmp_path / "images.gz"
    content = np.random.default_rng(0).integers(0, 256, 500, dtype=np.uint8).tobytes()
    path.write_bytes(damage(gzip.compress(content)))
    with refuses(str(path), "cannot be read", "again"):
        read_idx(path, 1)
