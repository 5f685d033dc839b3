"""Building by name: what is found, what is refused, and with which words."""

import inspect

import pytest
import torch
from omegaconf import OmegaConf

from dgavg.config import CONF
from dgavg.errors import UserError
from dgavg.models import MODELS, Model, build_model, model
from dgavg.settings import keyword_settings


def test_the_models_and_their_summaries() -> None:
    assert list(MODELS) == [
        "cnn",
        "timm",
        "torchvision",
        "domainbed",
        "mlp",
        "resnet18",
        "resnet50",
    ]
    for builder in MODELS.values():
        assert builder.__doc__
        summary = builder.__doc__.splitlines()[0]
        assert 20 < len(summary) < 100
        assert summary.endswith(".")


def test_settings_have_types_and_defaults() -> None:
    found = {name: keyword_settings(builder) for name, builder in MODELS.items()}
    assert found["cnn"] == {"batchnorm": (bool, False)}
    assert found["mlp"] == {
        "width": (int, 256),
        "depth": (int, 2),
        "batchnorm": (bool, True),
        "dropout": (float, 0.0),
    }
    shared = {
        "weights": (str | None, None),
        "freeze_bn": (bool, False),
        "dropout": (float, 0.0),
    }
    assert found["resnet18"] == found["resnet50"] == shared
    named = {"backbone": (str, inspect.Parameter.empty), **shared}
    assert found["timm"] == found["torchvision"] == named
    assert found["domainbed"] == {
        "weights": (str | None, "IMAGENET1K_V1"),
        "freeze_bn": (bool, True),
        "dropout": (float, 0.0),
        "resnet18": (bool, False),
    }
    with pytest.raises(UserError, match="no model 'cn'"):
        build_model("cn", (1, 8, 8), 3)


def test_an_added_model_gets_sizes_and_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "gone", MODELS["cnn"])
    del MODELS["gone"]
    seen: list[object] = []

    @model("gone")
    def build(input_shape: tuple[int, int, int], classes: int, *, gain: float = 1.0) -> Model:
        """A model of this test alone."""
        seen.extend([input_shape, classes, gain])
        return Model(torch.nn.Flatten(), torch.nn.Linear(8, classes))

    assert MODELS["gone"] is build
    assert isinstance(build_model("gone", [2, 2, 2], 4, gain=3), Model)
    assert seen == [(2, 2, 2), 4, 3]
    with pytest.raises(UserError, match="model 'gone' is there already"):
        model("gone")(build)
    assert MODELS["gone"] is build


@pytest.mark.parametrize("name", ["domainbed", "resnet18", "resnet50", "timm", "torchvision"])
def test_the_config_files_have_every_setting_and_its_default(name: str) -> None:
    file = OmegaConf.to_container(OmegaConf.load(CONF / "model" / f"{name}.yaml"))
    defaults = {k: default for k, (_, default) in keyword_settings(MODELS[name]).items()}
    required = {k: "???" for k, v in defaults.items() if v is inspect.Parameter.empty}
    assert file == {"name": name, **defaults, **required}


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "resnet81",
            {},
            r"^no model 'resnet81'; did you mean 'resnet18'\? Known: cnn, timm, .*resnet50$",
        ),
        (
            "mlp",
            {"widht": 8},
            r"^model mlp: no setting 'widht' in model; did you mean 'width'\? "
            r"Known: width, depth, batchnorm, dropout$",
        ),
        ("cnn", {"width": 8}, r"^model cnn: no setting 'width' in model; Known: batchnorm$"),
        ("mlp", {"width": "8"}, r"model\.width='8' must be an integer"),
        ("mlp", {"width": True}, r"model\.width=True must be an integer"),
        ("mlp", {"batchnorm": 1}, r"model\.batchnorm=1 must be true or false"),
        ("resnet18", {"weights": 3}, r"model\.weights=3 must be a text or null"),
        ("timm", {}, r"^model timm: model\.backbone is missing: set it to a text$"),
        ("mlp", {"width": 0}, r"^model\.width=0 .*write 1 or more"),
        ("mlp", {"depth": -1}, r"^model\.depth=-1 .*write 0 or more"),
        ("mlp", {"dropout": 1.0}, r"^model\.dropout=1\.0 is outside \[0, 1\)"),
        ("mlp", {"dropout": -0.1}, r"^model\.dropout=-0\.1 is outside"),
        ("resnet18", {"dropout": 1.0}, r"^model\.dropout=1\.0 is outside \[0, 1\)"),
        ("resnet18", {"freeze_bn": 1}, r"model\.freeze_bn=1 must be true or false"),
        ("torchvision", {}, r"^model torchvision: model\.backbone is missing: set it to a text$"),
    ],
)
def test_a_wrong_name_or_setting_is_one_line(
    name: str, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build_model(name, (3, 8, 8), 2, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "classes"), [((3, 8), 2), ((3, 8, 0), 2), ((3, 8, 8.0), 2), ((3, 8, 8), 0)]
)
def test_sizes_must_be_positive_integers(shape: tuple[int, int, int], classes: int) -> None:
    with pytest.raises(UserError, match="give channels, height, width and classes as positive"):
        build_model("cnn", shape, classes)


@pytest.mark.parametrize("shape", [5, (1, 8), "abc", (1, 8, 8.5)])
def test_an_input_shape_that_is_none_is_one_line(shape: object) -> None:
    with pytest.raises(UserError, match=r"cannot be built for input shape .*give channels, height"):
        build_model("mlp", shape, 3)  # type: ignore[arg-type]
