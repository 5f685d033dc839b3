"""ResNets against torchvision's own."""

from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import Tensor

from dgavg.errors import UserError
from dgavg.models import Normalize, build_model
from dgavg.models.model import backbone_of

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


@pytest.fixture(scope="module")
def donor() -> torchvision.models.ResNet:
    """Stands for pretrained weights: torchvision's ResNet-18 with moved statistics."""
    torch.manual_seed(3)
    net = torchvision.models.resnet18()
    with torch.no_grad():
        net(torch.rand(8, 3, 32, 32))
    return net.eval()


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """torchvision's download, answered from `published["state"]` or refused with an exception."""
    answer: dict[str, object] = {}

    def get(url: str, **_: object) -> dict[str, Tensor]:
        answer["url"] = url
        if isinstance(answer["state"], Exception):
            raise answer["state"]
        return answer["state"]  # type: ignore[return-value]

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", get)
    return answer


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_is_torchvisions_weight_for_weight(name: str) -> None:
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(num_classes=7)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    ours = build_model(name, (3, 32, 32), 7)
    assert torch.equal(torch.get_rng_state(), after)
    assert (
        sum(p.numel() for p in ours.parameters())
        == {
            "resnet18": 11_689_512 - 993 * 513,
            "resnet50": 25_557_032 - 993 * 2049,
        }[name]
    )
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = theirs.eval()((x - MEAN) / STD)
        torch.testing.assert_close(ours.eval()(x), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_other_channels_change_the_first_layer_alone(channels: int) -> None:
    torch.manual_seed(0)
    net = build_model("resnet18", (channels, 32, 32), 7)
    conv = backbone_of(net.featurizer).conv1
    theirs = torchvision.models.resnet18().conv1
    assert conv.weight.shape == (64, channels, 7, 7)
    assert conv.bias is None
    assert (conv.stride, conv.padding) == (theirs.stride, theirs.padding)
    ratio = conv.weight.std() / theirs.weight.std()  # torchvision fills by fan-out: no C in it
    assert 0.9 < ratio < 1.1
    layer = next(m for m in net.modules() if isinstance(m, Normalize))
    assert layer.mean.flatten().tolist() == layer.std.flatten().tolist() == [0.5] * channels


def test_a_file_gives_torchvisions_features(
    donor: torchvision.models.ResNet, tmp_path: Path
) -> None:
    torch.save(donor.state_dict(), tmp_path / "donor.pth")
    net = build_model("resnet18", (3, 32, 32), 7, weights=str(tmp_path / "donor.pth")).eval()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        donor_logits = donor((x - MEAN) / STD)
        logits = torch.nn.functional.linear(net.featurizer(x), donor.fc.weight, donor.fc.bias)
    torch.testing.assert_close(logits, donor_logits)
    assert net.classifier.weight.shape == (7, 512)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_pretrained_weights_see_grey_alike_in_any_channels(
    donor: torchvision.models.ResNet, tmp_path: Path, channels: int
) -> None:
    torch.save(donor.state_dict(), tmp_path / "donor.pth")
    net = build_model("resnet18", (channels, 32, 32), 7, weights=tmp_path / "donor.pth").eval()
    grey = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        ours = backbone_of(net.featurizer)(grey.expand(-1, channels, -1, -1))
        theirs = donor.fc(ours), donor(grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(*theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weights", ["default", "IMAGENET1K_V1"])
def test_published_weights(
    donor: torchvision.models.ResNet, published: dict[str, object], weights: str
) -> None:
    published["state"] = donor.state_dict()
    net = build_model("resnet18", (3, 32, 32), 7, weights=weights)
    assert published["url"] == "https://download.pytorch.org/models/resnet18-f37072fd.pth"
    backbone = backbone_of(net.featurizer)
    torch.testing.assert_close(backbone.layer4[1].conv2.weight, donor.layer4[1].conv2.weight)
    torch.testing.assert_close(backbone.bn1.running_mean, donor.bn1.running_mean)


@pytest.mark.parametrize(
    ("weights", "part"), [("default", "11ad3fa6"), ("IMAGENET1K_V1", "0676ba61")]
)
def test_resnet50_has_two_sets(published: dict[str, object], weights: str, part: str) -> None:
    published["state"] = {
        n: t for n, t in torchvision.models.resnet50().state_dict().items() if "fc" not in n
    }
    build_model("resnet50", (3, 32, 32), 7, weights=weights)
    assert part in str(published["url"])


@pytest.mark.parametrize(
    "failure",
    [
        URLError("no route to host"),
        RuntimeError("invalid hash value (expected ab)"),
        TimeoutError(),
    ],
)
def test_a_failed_download_is_one_line(published: dict[str, object], failure: Exception) -> None:
    published["state"] = failure
    with pytest.raises(
        UserError, match=r"weights .*resnet18 IMAGENET1K_V1: .*(route|hash|TimeoutError).*null"
    ):
        build_model("resnet18", (3, 32, 32), 7, weights="default")


def test_a_misspelt_name_is_taken_for_a_file() -> None:
    with pytest.raises(UserError, match=r"no weights file 'defualt'; .*'default'"):
        build_model("resnet18", (3, 32, 32), 7, weights="defualt")
