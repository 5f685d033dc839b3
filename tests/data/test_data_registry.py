import subprocess
import sys
from collections.abc import Sequence
from inspect import Parameter, signature
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from dgavg.data import DATASETS, dataset, load


@pytest.fixture
def given(monkeypatch, make_data):
    """A registered loader `probe` that records the settings it is called with."""
    seen = {}

    @dataset("probe")
    def probe(
        *,
        root: str,
        size: int = 1,
        rate: float = 0.5,
        on: bool = False,
        angles: Sequence[float] = (1.0,),
        names: list[str] | None = None,
        limit: int | None = None,
    ):
        """A probe."""
        seen.update(locals())
        return make_data([3, 3])

    yield seen
    del DATASETS["probe"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("root", "a"),
        ("root", Path("a/b")),
        ("size", 3),
        ("size", np.int64(3)),
        ("rate", 2),
        ("rate", 0.25),
        ("on", True),
        ("angles", [0, 15]),
        ("angles", OmegaConf.create([0, 15])),
        ("names", ["x"]),
        ("names", ("x",)),
        ("names", None),
        ("limit", None),
        ("limit", 4),
    ],
)
def test_settings_that_fit(given, key, value):
    load("probe", **{"root": "r", key: value})
    assert given[key] == value


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("root", 3, "a text, not int"),
        ("root", None, "a text, not NoneType"),
        ("size", "big", "an integer, not str"),
        ("size", 2.0, "an integer, not float"),
        ("size", True, "an integer, not bool"),
        ("rate", "x", "a number, not str"),
        ("rate", True, "a number, not bool"),
        ("on", 1, "true or false, not int"),
        ("angles", 15, "a list, each item a number, not int"),
        ("angles", "15", "a list, each item a number, not str"),
        ("angles", [0, "x"], "a list, each item a number, not list"),
        ("names", "photo", "a list, each item a text or null, not str"),
        ("limit", 1.5, "an integer or null, not float"),
    ],
)
def test_settings_that_do_not_fit(given, refuses, key, value, words):
    with refuses(f"data.{key}={value!r} must be {words}"):
        load("probe", **{"root": "r", key: value})
    assert not given


def test_unknown_and_missing_settings(given, refuses):
    with refuses("no setting 'siez' in data", "did you mean 'size'", "root, size, rate"):
        load("probe", root="r", siez=3)
    with refuses("data.root is missing: set it to a text"):
        load("probe")


def test_unknown_name(refuses):
    with refuses("no data set 'digits_rotate'", "did you mean 'digits_rotated'", "rotated_mnist"):
        load("digits_rotate")


def test_a_name_is_registered_once(given, refuses):
    with refuses("'probe'", "registered already"):
        dataset("probe")(lambda: None)


def test_every_loader_documents_itself():
    assert set(DATASETS) >= {
        *(
            "digits_rotated",
            "rotated_mnist",
            "colored_mnist",
            "digits",
            "folder",
            "features",
            "hub",
        ),
        *("pacs", "vlcs", "officehome", "terra_incognita", "domainnet", "sviro", "spawrious"),
        *("camelyon17", "fmow"),
    }
    for loader in DATASETS.values():
        summary = loader.__doc__.splitlines()[0]
        assert summary.endswith((".", "?", ")", "classes)."))
        assert len(summary) < 100
        for parameter in signature(loader).parameters.values():
            assert parameter.kind is Parameter.KEYWORD_ONLY
            assert parameter.annotation is not Parameter.empty


def test_import_is_cheap_and_leaves_heavy_packages_alone():
    code = (
        "import sys, dgavg.data; print(len(dgavg.data.DATASETS) >= 5,"
        " [m for m in ('sklearn', 'torchvision', 'pandas', 'scipy', 'datasets', 'wilds', 'gdown')"
        " if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "True []"
