import pytest
import torch

from dgavg.data import Domain, DomainDataset


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
