"""The network that DomainBed takes for a shape, and weights that DomainBed saved."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from dgavg.errors import UserError
from dgavg.models import Model, build_model
from dgavg.models.model import backbone_of
from dgavg.models.registry import MODELS


def names(net: nn.Module) -> dict[str, tuple[int, ...]]:
    return {n: tuple(t.shape) for n, t in net.state_dict().items()}


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What the libraries' downloads were asked for, and a ResNet-50 as what they gave."""
    torch.manual_seed(5)
    seen: dict[str, object] = {"state": torchvision.models.resnet50().state_dict()}

    def get(url: str, **_: object) -> object:
        seen["url"] = url
        return seen["state"]

    def get_timm(hub: str, **_: object) -> object:
        seen["hub"] = hub
        return seen["state"]

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", get)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", get_timm)
    return seen


def is_frozen(net: nn.Module) -> bool:
    modes = {m.training for m in net.train().modules() if isinstance(m, nn.BatchNorm2d)}
    assert len(modes) == 1
    return modes == {False}


def test_at_28_pixels_it_is_the_cnn_and_no_setting_applies() -> None:
    torch.manual_seed(0)
    cnn = build_model("cnn", (2, 28, 28), 2)
    torch.manual_seed(0)
    net = build_model("domainbed", (2, 28, 28), 2, weights="augmix", resnet18=True, dropout=0.5)
    assert names(net) == names(cnn)
    x = torch.rand(2, 2, 28, 28)
    torch.testing.assert_close(net(x), cnn(x), rtol=0, atol=0)


def test_by_default_it_is_a_frozen_resnet50_of_the_first_weights(
    downloads: dict[str, object],
) -> None:
    net = build_model("domainbed", (3, 32, 32), 7)
    assert downloads["url"] == "https://download.pytorch.org/models/resnet50-0676ba61.pth"
    assert names(net) == names(build_model("resnet50", (3, 32, 32), 7))
    state = downloads["state"]
    assert isinstance(state, dict)
    assert torch.equal(backbone_of(net.featurizer).layer1[0].conv2.weight, state[PROBE])
    assert is_frozen(net)
    assert [n for n, _ in net.featurizer.named_children()] == ["normalize", "backbone"]


PROBE = "layer1.0.conv2.weight"


def test_augmix_is_timms_and_has_the_names_and_numbers_of_the_other(
    downloads: dict[str, object],
) -> None:
    net = build_model("domainbed", (3, 64, 64), 7, weights="augmix", freeze_bn=False, dropout=0.25)
    assert downloads["hub"] == "timm/resnet50.ram_in1k"
    assert not is_frozen(net)
    assert net.featurizer.dropout.p == 0.25
    # who rebuilds a trained model leaves the weights out, and gets torchvision's
    other = build_model("domainbed", (3, 64, 64), 7, weights=None, freeze_bn=False, dropout=0.25)
    assert list(net.state_dict()) == list(other.state_dict())
    other.load_state_dict(net.state_dict())
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(x), other.eval()(x), rtol=1e-4, atol=1e-4)


def test_resnet18() -> None:
    net = build_model("domainbed", (3, 32, 32), 7, weights=None, resnet18=True)
    assert names(net) == names(build_model("resnet18", (3, 32, 32), 7))
    assert is_frozen(net)
    with pytest.raises(UserError, match=r"augmix are a ResNet-50's; write model\.resnet18=false"):
        build_model("domainbed", (3, 32, 32), 7, weights="augmix", resnet18=True)


@pytest.mark.parametrize("size", [(16, 16), (31, 64), (64, 28), (1, 1)])
def test_other_small_images_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=rf"28×28, or 32×32 and more, not {size[0]}×{size[1]};"):
        build_model("domainbed", (3, *size), 7)


def test_weights_that_cannot_be_had_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(
        UserError, match=r"weights resnet50 IMAGENET1K_V1: no route.*model\.weights"
    ):
        build_model("domainbed", (3, 32, 32), 7)


def saved_by_domainbed(folder: Path, classes: int = 7) -> tuple[Path, dict[str, Tensor]]:
    """As `model.pkl`: the algorithm twice, a discriminator, settings with NumPy's numbers."""
    torch.manual_seed(6)
    net, head = torchvision.models.resnet18(), nn.Linear(512, classes)
    net.fc = nn.Identity()
    state = {f"featurizer.network.{n}": t for n, t in net.state_dict().items()}
    state |= {f"classifier.{n}": t for n, t in head.state_dict().items()}
    again = {n.replace("featurizer.", "network.0."): t for n, t in state.items()}
    again = {n.replace("classifier.", "network.1."): t for n, t in again.items()}
    content = {
        "args": {"algorithm": "ERM", "test_envs": [0], "hparams": None},
        "model_input_shape": (3, 224, 224),
        "model_num_classes": classes,
        "model_num_domains": 3,
        "model_hparams": {
            "lr": 5e-5,
            "resnet_dropout": np.random.RandomState(0).choice([0.0, 0.1, 0.5]),
            "batch_size": np.int64(32),
            "resnet18": np.bool_(True),
        },
        "model_dict": state | again | {"discriminator.0.weight": torch.rand(2, 2)},
    }
    torch.save(content, folder / "model.pkl")
    return folder / "model.pkl", state


@pytest.mark.parametrize("name", ["resnet18", "domainbed", "timm", "torchvision"])
def test_a_domainbed_model_loads_with_its_classifier(name: str, tmp_path: Path) -> None:
    path, state = saved_by_domainbed(tmp_path)
    settings = {
        "domainbed": {"resnet18": True},
        "timm": {"backbone": "resnet18"},
        "torchvision": {"backbone": "resnet18"},
    }.get(name, {})
    net: Model = build_model(name, (3, 32, 32), 7, weights=str(path), **settings)
    for key, tensor in backbone_of(net.featurizer).state_dict().items():
        assert torch.equal(tensor, state[f"featurizer.network.{key}"]), key
    assert torch.equal(net.classifier.weight, state["classifier.weight"])
    assert "domainbed" in MODELS


def test_numbers_of_older_numpy_are_read_too(tmp_path: Path) -> None:
    path, state = saved_by_domainbed(tmp_path)
    content = torch.load(path, weights_only=False)
    torch.save(content, path, _use_new_zipfile_serialization=False)
    written = path.read_bytes()
    assert b"cnumpy._core.multiarray\n" in written  # as NumPy 2 calls it
    path.write_bytes(written.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    net = build_model("resnet18", (3, 32, 32), 7, weights=str(path))
    assert torch.equal(net.classifier.weight, state["classifier.weight"])


def test_a_domainbed_model_of_another_network_is_refused(tmp_path: Path) -> None:
    path, _ = saved_by_domainbed(tmp_path)
    with pytest.raises(UserError) as caught:
        build_model("resnet50", (3, 32, 32), 7, weights=str(path))
    assert "missing (featurizer.backbone.layer1.0.conv3.weight, " in str(caught.value)
    with pytest.raises(UserError, match=r"2 of another shape \(classifier\.weight 7×512 for 5×512"):
        build_model("resnet18", (3, 32, 32), 5, weights=str(path))
