"""timm backbones: built as timm builds them, with their own normalisation, and real weights."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from dgavg.averaging import recalibrate_batchnorm
from dgavg.errors import UserError
from dgavg.models import Normalize, build_model
from dgavg.models.model import backbone_of

LITE = "tf_efficientnet_lite0"
DATA = Path(
    os.environ.get("DGAVG_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data")
)
WEIGHTS = DATA / "weights" / f"{LITE}_imagenet1k.safetensors"
real_weights = pytest.mark.skipif(
    not WEIGHTS.is_file(), reason=f"no {WEIGHTS.name} under DGAVG_TEST_DATA"
)


def constants(net: nn.Module) -> tuple[list[float], list[float]]:
    layer = next(m for m in net.modules() if isinstance(m, Normalize))
    return layer.mean.flatten().tolist(), layer.std.flatten().tolist()


@pytest.mark.parametrize(
    ("backbone", "features"),
    [(LITE, 1280), ("mobilenetv3_small_050", 1024), ("resnet10t", 512), ("test_vit", 64)],
)
def test_is_timms_weight_for_weight(backbone: str, features: int) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model(backbone, num_classes=0)
    head = nn.Linear(features, 7)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    size = theirs.pretrained_cfg["input_size"][1]
    ours = build_model("timm", (3, size, size), 7, backbone=backbone)
    assert torch.equal(torch.get_rng_state(), after)
    x = torch.rand(2, 3, size, size)
    mean, std = (torch.tensor(theirs.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        expected = head(theirs.eval()((x - mean) / std))
        torch.testing.assert_close(ours.eval()(x), expected)


def test_normalisation_is_the_backbones_own() -> None:
    assert constants(build_model("timm", (3, 32, 32), 2, backbone=LITE)) == ([0.5] * 3, [0.5] * 3)
    mean, std = constants(build_model("timm", (3, 32, 32), 2, backbone="resnet10t"))
    assert mean == pytest.approx([0.485, 0.456, 0.406])
    assert std == pytest.approx([0.229, 0.224, 0.225])
    net = build_model("timm", (2, 32, 32), 2, backbone="resnet10t")
    assert constants(net) == ([0.5] * 2, [0.5] * 2)


def test_a_transformer_is_built_for_the_image_size() -> None:
    net = build_model("timm", (1, 48, 32), 2, backbone="vit_tiny_patch16_224").eval()
    assert backbone_of(net.featurizer).pos_embed.shape == (1, 1 + 3 * 2, 192)
    assert net(torch.rand(2, 1, 48, 32)).shape == (2, 2)


def test_measuring_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    net = timm.create_model("resnet10t", num_classes=0)
    forward = net.forward

    def noisy(x: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        return forward(x + torch.rand_like(x))

    monkeypatch.setattr(net, "forward", noisy)
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: net)
    torch.manual_seed(0)
    build_model("timm", (3, 32, 32), 2, backbone="resnet10t")
    after = torch.get_rng_state()
    torch.manual_seed(0)
    nn.Linear(512, 2)
    assert torch.equal(torch.get_rng_state(), after)
    assert all(m.training for m in net.modules())
    assert net.bn1.num_batches_tracked == 0


def test_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"install it with pip install 'dgavg\[timm\]'"):
        build_model("timm", (3, 32, 32), 2, backbone=LITE)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ("tf_eficientnet_lite0", f"no backbone 'tf_eficientnet_lite0'; did you mean '{LITE}' or "),
        ("qqqqqqqq", r"no backbone 'qqqqqqqq'; timm\.list_models\(\) has them all"),
        ("hf-hub:timm/resnet18.a1_in1k", "no backbone 'hf-hub:"),
        ("resnet18.nobody", r"Invalid pretrained tag \(nobody\) for resnet18; write"),
    ],
)
def test_an_unknown_backbone_is_one_line(backbone: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build_model("timm", (3, 32, 32), 2, backbone=backbone)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_a_backbone_that_refuses_the_images_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    net = timm.create_model("resnet10t", num_classes=0)
    monkeypatch.setattr(net, "forward", lambda x: x.reshape(7, -1, 13))
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: net)
    with pytest.raises(UserError, match=r"'resnet10t' cannot be built for images .*\(3, 32, 32\)"):
        build_model("timm", (3, 32, 32), 2, backbone="resnet10t")
    monkeypatch.setattr(net, "forward", lambda x: x)
    with pytest.raises(UserError, match=r"'resnet10t' gives features of shape \(1, 3, 32, 32\)"):
        build_model("timm", (3, 32, 32), 2, backbone="resnet10t")


def test_default_weights_are_timms_download(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    donor = timm.create_model("resnet10t").state_dict()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: donor)
    net = build_model("timm", (3, 32, 32), 2, backbone="resnet10t", weights="default")
    for name, tensor in backbone_of(net.featurizer).state_dict().items():
        torch.testing.assert_close(tensor, donor[name])


def test_a_failed_download_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fail)
    with pytest.raises(UserError, match=r"pretrained weights of timm's resnet10t: no route; write"):
        build_model("timm", (3, 32, 32), 2, backbone="resnet10t", weights="default")


@real_weights
@pytest.mark.parametrize("channels", [1, 3])
def test_real_weights_load_strictly(channels: int) -> None:
    from safetensors.torch import load_file

    net = build_model("timm", (channels, 32, 32), 7, backbone=LITE, weights=WEIGHTS)
    assert constants(net) == ([0.5] * channels, [0.5] * channels)
    file = load_file(WEIGHTS)
    ours = backbone_of(net.featurizer).state_dict()
    assert set(file) - set(ours) == {"classifier.weight", "classifier.bias"}
    for name in set(ours) - {"conv_stem.weight"}:
        torch.testing.assert_close(ours[name], file[name], rtol=0, atol=0)
    stem = file["conv_stem.weight"]
    expected = stem if channels == 3 else stem.sum(1, keepdim=True)
    torch.testing.assert_close(ours["conv_stem.weight"], expected)


FEATURES = DATA / "features" / "pacs_tf_lite0_224.npz"
PHOTO = DATA / "PACS" / "photo"


@real_weights
@pytest.mark.skipif(
    not (PHOTO.is_dir() and FEATURES.is_file()), reason="no PACS under DGAVG_TEST_DATA"
)
def test_real_photos_lie_near_the_stored_features_of_their_class() -> None:
    """70 photos of 112 pixels against the class means of features made elsewhere at 224 pixels."""
    images, labels = [], []
    for label, folder in enumerate(sorted(PHOTO.iterdir())):
        for file in sorted(folder.iterdir())[:10]:
            pixels = np.asarray(Image.open(file).convert("RGB"))
            images.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255)
            labels.append(label)
    x, y = torch.stack(images), torch.tensor(labels)

    with np.load(FEATURES) as file:
        stored, classes, domains = (torch.from_numpy(file[k]) for k in ("X", "y", "d"))
    photo = [stored[(domains == 2) & (classes == k)].float().mean(0) for k in range(7)]
    means = nn.functional.normalize(torch.stack(photo))

    net = build_model("timm", (3, 112, 112), 7, backbone=LITE, weights=WEIGHTS).eval()
    with torch.no_grad():
        nearest = (nn.functional.normalize(net.featurizer(x)) @ means.T).argmax(1)
    assert (nearest == y).float().mean() > 0.85  # chance: 0.14


@pytest.mark.slow
@real_weights
@pytest.mark.skipif(not PHOTO.is_dir(), reason="no PACS under DGAVG_TEST_DATA")
@pytest.mark.parametrize(("weights", "least", "most"), [(WEIGHTS, 0.9, 1.0), (None, 0.0, 0.5)])
def test_real_weights_know_photos_and_random_ones_do_not(
    weights: Path | None, least: float, most: float
) -> None:
    """Nearest class means of 30 photos a class, on 30 others: chance is 0.14."""
    torch.manual_seed(0)
    net = build_model("timm", (3, 112, 112), 7, backbone=LITE, weights=weights)
    by_class = []
    for folder in sorted(PHOTO.iterdir()):
        pixels = [np.asarray(Image.open(f).convert("RGB")) for f in sorted(folder.iterdir())[:60]]
        by_class.append(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255)
    if weights is None:  # with the statistics of a new model its features would vanish
        recalibrate_batchnorm(net, [torch.cat([x[:20] for x in by_class])])
    net.eval()
    with torch.no_grad():
        stacked = nn.functional.normalize(torch.stack([net.featurizer(x) for x in by_class]), dim=2)
    means = nn.functional.normalize(stacked[:, :30].mean(1))
    nearest = (stacked[:, 30:] @ means.T).argmax(2)
    accuracy = (nearest == torch.arange(7)[:, None]).float().mean()
    assert least < accuracy < most


@pytest.mark.parametrize("nested", [False, True])
def test_files_that_do_not_fit_name_the_first_tensors(nested: bool, tmp_path: Path) -> None:
    state = timm.create_model("resnet10t").state_dict()
    state["extra.weight"] = torch.rand(2)
    del state["layer1.0.conv2.weight"]
    torch.save({"model": state} if nested else state, tmp_path / "w.pt")
    message = r"1 missing \(layer1\.0\.conv2\.weight\), 1 unexpected \(extra\.weight\); nothing"
    with pytest.raises(UserError, match=message):
        build_model("timm", (3, 32, 32), 2, backbone="resnet10t", weights=str(tmp_path / "w.pt"))
