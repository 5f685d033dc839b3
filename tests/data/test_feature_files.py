"""Features in one .npz: read, written, and trained on."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from dgavg.data import load, make_splits
from dgavg.data.features import write_features

X = np.random.default_rng(0).standard_normal((7, 3)).astype(np.float16)
D = np.array([1, 0, 1, 0, 1, 1, 0], np.uint8)
Y = np.array([0, 1, 1, 0, 0, 1, 1], np.uint8)


@pytest.fixture
def write(tmp_path):
    """Write a file of the arrays above, some of them others; None leaves one out."""

    def one(**others):
        arrays = {"X": X, "y": Y, "d": D} | others
        path = tmp_path / "made.npz"
        np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
        return str(path)

    return one


def test_rows_go_to_their_domains_in_order(write):
    data = load("features", file=write())
    assert data.name == "made"
    assert data.names == ("0", "1")
    assert data.classes == ("0", "1")
    assert data.input_shape == (3, 1, 1)
    assert data.official is None
    for i, domain in enumerate(data.domains):
        assert domain.images.dtype == torch.float16
        assert torch.equal(domain.images[:, :, 0, 0], torch.from_numpy(X[i == D]))
        assert domain.labels.tolist() == Y[i == D].tolist()


def test_float32_stays_float32(write):
    data = load("features", file=write(X=X.astype(np.float32)))
    assert data.domains[0].images.dtype == torch.float32


def test_names_are_the_files_or_the_settings(write):
    names = {"domains": np.array(["a", "b"]), "classes": np.array(["x", "y", "z"])}
    path = write(**names, title=np.array("mine"))
    data = load("features", file=path)
    assert (data.name, data.names, data.classes) == ("mine", ("a", "b"), ("x", "y", "z"))
    data = load("features", file=path, domains=["p", "q"], classes=["r", "s"], title="ours")
    assert (data.name, data.names, data.classes) == ("ours", ("p", "q"), ("r", "s"))


def test_domains_and_classes_may_be_given_by_name(write):
    path = write(d=np.array(["ink", "art"])[D], y=np.array(["dog", "cat"])[Y])
    data = load("features", file=path)
    assert (data.names, data.classes) == (("art", "ink"), ("cat", "dog"))
    assert data.domains[0].labels.tolist() == (1 - Y[D == 1]).tolist()
    data = load("features", file=path, domains=["ink", "art"])
    assert data.names == ("ink", "art")
    assert torch.equal(data.domains[0].images[:, :, 0, 0], torch.from_numpy(X[D == 0]))


def test_a_training_list_makes_official_splits(write):
    train = np.array([1, 1, 0, 0, 1, 1, 1], bool)
    data = load("features", file=write(train=train))
    splits = make_splits(data, 0.2, 0, "official")
    assert [keys.tolist() for keys in splits.in_] == [[0, 2], [0, 2, 3]]
    assert [keys.tolist() for keys in splits.out] == [[1], [1]]
    assert [keys.tolist() for keys in splits.test] == [[0, 1, 2], [0, 1, 2, 3]]


def test_content_is_that_of_the_features(write):
    first = load("features", file=write(content=np.array("same"))).fingerprint()
    assert load("features", file=write()).fingerprint() == first
    assert load("features", file=write(X=X + 1, content=np.array("same"))).fingerprint() != first


def with_infinity(x):
    x = x.copy()
    x[4, 1] = np.inf
    return x


@pytest.mark.parametrize(
    ("others", "parts"),
    [
        ({"X": None}, ["lacks the array X", "float16 or float32"]),
        ({"y": None, "d": None}, ["lacks the array y, d"]),
        ({"X": X.astype(np.float64)}, ["X float64 (7, 3)"]),
        ({"X": X[:, None]}, ["X float16 (7, 1, 3)"]),
        ({"X": X[:0], "y": Y[:0], "d": D[:0]}, ["X float16 (0, 3)"]),
        ({"y": Y[:5]}, ["y uint8 (5,) for X (7, 3)"]),
        ({"d": D.astype(float)}, ["d float64 (7,)"]),
        ({"d": D.astype(np.int64) - 1}, ["d has -1", "from 0"]),
        ({"d": D * 2}, ["no row of domain '1'"]),
        ({"domains": np.array(["a"])}, ["d has 1", "domains names only 1: a", "data.domains="]),
        ({"y": Y + 2, "classes": np.array(["x", "y"])}, ["y has 3", "data.classes="]),
        ({"d": np.array(["a", "b"])[D], "domains": np.array(["a", "c"])}, ["d has b", "['a',"]),
        ({"train": np.ones(7)}, ["train", "bool (7,)"]),
        ({"train": D == 0}, ["train leaves nothing of domain '0'"]),
        ({"X": with_infinity(X)}, ["1 row(s)", "[4]", "not finite"]),
        ({"y": np.array([None] * 7)}, ["cannot be read as .npz"]),
        ({"d": D * 0}, ["1 domain(s)"]),
    ],
)  # fmt: skip
def test_other_files_are_refused(write, refuses, others, parts):
    with refuses(*parts):
        load("features", file=write(**others))


def test_files_that_are_none(tmp_path, refuses):
    with refuses("data.file is missing"):
        load("features")
    with refuses(f"no file {tmp_path / 'none.npz'}", "X float16"):
        load("features", file=str(tmp_path / "none.npz"))
    for content in (b"", b"PK\x03\x04", b"\x93NUMPY"):
        (tmp_path / "bad.npz").write_bytes(content)
        with refuses("bad.npz cannot be read as .npz", "write it again"):
            load("features", file=str(tmp_path / "bad.npz"))


def test_what_is_written_is_read_again(tmp_path, refuses):
    path = tmp_path / "out.npz"
    train = np.array([1, 1, 0, 0, 1, 1, 1], bool)
    names = ["art", "ink"], ["cat", "dog", "fox"]
    write_features(path, X, Y, D, *names, "toy", "abc", train=train)
    data = load("features", file=str(path))
    assert (data.name, data.names, data.classes) == ("toy", ("art", "ink"), ("cat", "dog", "fox"))
    assert torch.equal(data.domains[1].images[:, :, 0, 0], torch.from_numpy(X[D == 1]))
    assert data.official is not None
    with np.load(path) as arrays:
        assert str(arrays["content"]) == "abc"
    before = path.read_bytes()
    with refuses("y has 1", "classes"):
        write_features(path, X, Y, D, ["art", "ink"], ["cat"], "toy", "abc")
    with refuses("d uint8 (3,)"):
        write_features(path, X, Y, D[:3], *names, "toy", "abc")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out.npz"]
    with refuses("cannot be written"):
        write_features(tmp_path / "no" / "out.npz", X, Y, D, *names, "toy", "abc")


@pytest.mark.slow
def test_a_head_learns_pacs_from_features_in_seconds(real_data, tmp_path):
    file = real_data / "features" / "pacs_tf_lite0_224.npz"
    words = [
        "data=features", f"data.file={file}", "data.domains=[art_painting,cartoon,photo,sketch]",
        "model=mlp", "trainer=ema_basic", "protocol.steps=100", "protocol.eval_every=50",
        "optimizer.lr=1e-3", "seeds=[0]", f"runs={tmp_path}", "name=head",
    ]  # fmt: skip
    command = [sys.executable, "-m", "dgavg", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    accuracy = {}
    for fold in ("art_painting", "cartoon", "photo", "sketch"):
        lines = (tmp_path / "head" / fold / "0" / "records.jsonl").read_text().splitlines()
        splits = json.loads(lines[-1])["candidates"]["live"]["splits"]
        accuracy[fold] = splits[f"{fold}/in"]["accuracy"]
    assert accuracy["photo"] > 0.9
    assert accuracy["art_painting"] > 0.6
    assert min(accuracy.values()) > 0.4
