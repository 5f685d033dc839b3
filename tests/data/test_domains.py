import dataclasses

import pytest
import torch

from dgavg.data import Domain, DomainDataset
from dgavg.data.domains import as_floats


def domain(name="a", n=4, shape=(3, 8, 8), dtype=torch.uint8, labels=None):
    labels = torch.zeros(n, dtype=torch.int64) if labels is None else labels
    return Domain(name, torch.zeros(n, *shape, dtype=dtype), labels)


def build(*domains, classes=("x", "y")):
    return DomainDataset("toy", domains, classes)


def test_what_it_says_about_itself():
    data = build(domain("a", shape=(2, 5, 7)), domain("b", n=3, shape=(2, 5, 7)))
    assert data.names == ("a", "b")
    assert data.input_shape == (2, 5, 7)
    assert data.index("b") == 1
    assert len(data.domains[1]) == 3
    assert data.notes == ()


def test_unknown_domain_names_the_nearest(refuses):
    with refuses("'toy'", "'photos'", "did you mean 'photo'", "sketch"):
        build(domain("photo"), domain("sketch")).index("photos")


@pytest.mark.parametrize(
    ("second", "parts"),
    [
        (domain("a"), ["domain 'a' twice"]),
        (domain("b", n=0), ["'b'", "no image"]),
        (domain("b", shape=(3, 8, 9)), ["'b'", "(3, 8, 9)", "(3, 8, 8)"]),
        (domain("b", dtype=torch.float32), ["'b'", "float32", "uint8"]),
        (domain("b", shape=(8, 8)), ["'b'", "(4, 8, 8)", "(N, C, H, W)"]),
        (domain("b", labels=torch.zeros(3, dtype=torch.int64)), ["'b'", "(3,)", "4 images"]),
        (domain("b", labels=torch.zeros(4)), ["'b'", "float32", "int64"]),
        (domain("b", labels=torch.tensor([0, 1, 2, 0])), ["'b'", "0..2", "0..1"]),
        (domain("b", labels=torch.tensor([0, 1, -1, 0])), ["'b'", "-1..1", "0..1"]),
    ],
)
def test_refuses_a_bad_domain(refuses, second, parts):
    with refuses("data set 'toy'", *parts):
        build(domain("a"), second)


def test_refuses_one_domain_and_a_class_twice(refuses):
    with refuses("'toy' has 1 domain(s) (a)", "at least 2"):
        build(domain("a"))
    with refuses("class 'x' twice"):
        build(domain("a"), domain("b"), classes=("x", "x"))


def features(dtype=torch.float16, n=4, width=5, value=0.5):
    return torch.full((n, width, 1, 1), value, dtype=dtype)


def with_images(name, images, labels=None):
    labels = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels
    return Domain(name, images, labels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_features_are_images_of_one_pixel(dtype):
    data = build(with_images("a", features(dtype)), with_images("b", features(dtype, n=2)))
    assert data.input_shape == (5, 1, 1)
    assert data.domains[0].images.dtype == dtype


@pytest.mark.parametrize(
    ("second", "parts"),
    [
        (features(torch.float32), ["'b'", "torch.float32", "'a'", "torch.float16", "one kind"]),
        (features(torch.float64), ["float64", "float16 or float32 (N, F, 1, 1)"]),
        (features()[:, :, 0, 0], ["'b'", "(4, 5)", "(N, F, 1, 1)"]),
        (features().expand(4, 5, 1, 2), ["'b'", "(4, 5, 1, 2)"]),
        (features(value=float("nan")), ["'b'", "not finite"]),
        (features(value=float("inf")), ["'b'", "not finite"]),
    ],
)
def test_refuses_bad_features(refuses, second, parts):
    with refuses("data set 'toy'", *parts):
        build(with_images("a", features()), with_images("b", second))


def test_refuses_files_that_are_not_one_for_each_image(refuses):
    images = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    labels = torch.zeros(3, dtype=torch.int64)
    named = Domain("a", images, labels, ("x", "y", "z"))
    assert build(named, Domain("b", images, labels)).domains[0].files == ("x", "y", "z")
    with refuses("'b'", "2 files for 3 images"):
        build(named, Domain("b", images, labels, ("x", "y")))


def test_the_fingerprint_is_of_names_images_and_labels():
    """Those of runs that were made long ago must not change."""

    def data(value=3, label=1, name="a", classes=("x", "y"), dtype=torch.uint8):
        images = torch.arange(24).view(2, 3, 2, 2).to(dtype)
        images[1, 0, 0, 0] = value
        first = with_images(name, images, torch.tensor([0, label]))
        return build(first, with_images("b", images), classes=classes)

    known = data().fingerprint()
    assert known == "34202e327ce52f08"
    others = [data(4), data(label=0), data(name="c"), data(classes=("x", "z"))]
    assert len({known, *(other.fingerprint() for other in others)}) == 5
    assert dataclasses.replace(data(), name="other", notes=("n",)).fingerprint() == known
    assert dataclasses.replace(data(), content="kept").fingerprint() == "kept"
    halves = build(with_images("a", features()), with_images("b", features()))
    assert halves.fingerprint() != known


def test_as_floats():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert as_floats(pixels).dtype == torch.float32
    assert torch.equal(as_floats(pixels).flatten(), torch.arange(256) / 255)
    assert torch.equal(as_floats(features()), features(torch.float32))
    assert as_floats(features()).dtype == torch.float32
