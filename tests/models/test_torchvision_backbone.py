"""torchvision's networks: split as they are, with their own normalisation and weights."""

import re
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.vision_transformer import interpolate_embeddings

from dgavg.errors import UserError
from dgavg.models import Model, Normalize, build_model
from dgavg.models.model import backbone_of

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
# name: image size, F, what stays of its head, in the names of the state dict
NETS = {
    "shufflenet_v2_x0_5": (64, 1024, []),  # fc
    "densenet121": (64, 1024, []),  # classifier
    "mobilenet_v3_small": (64, 1024, ["classifier.0.weight", "classifier.0.bias"]),
    "convnext_tiny": (32, 768, ["classifier.0.weight", "classifier.0.bias"]),
    "swin_t": (32, 768, []),  # head
    "vit_b_32": (64, 768, []),  # heads
}


def build(name: str, size: int = 32, channels: int = 3, **settings: object) -> Model:
    return build_model("torchvision", (channels, size, size), 7, backbone=name, **settings)


def settle(net: nn.Module, x: Tensor) -> None:
    """Give a new network the statistics of `x`: with its first ones features vanish."""
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 1.0
    net.train()(x)


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """What torchvision's download gives, to be filled by the test."""
    state: dict[str, Tensor] = {}
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: state)
    return state


@pytest.mark.parametrize("name", NETS)
def test_is_torchvisions_weight_for_weight(name: str) -> None:
    size, features, kept = NETS[name]
    options = {"image_size": size} if name.startswith("vit") else {}
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name, num_classes=7, **options)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    ours = build(name, size)
    assert torch.equal(torch.get_rng_state(), after)
    assert all(m.training for m in ours.modules())
    pairs = list(zip(theirs.state_dict().values(), ours.state_dict().values(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert isinstance(ours.classifier, nn.Linear)
    assert ours.classifier.in_features == features
    head = [n for n in backbone_of(ours.featurizer).state_dict() if re.match("fc|classif|head", n)]
    assert head == kept
    assert [n for n in ours.state_dict() if not n.startswith("featurizer.backbone.")] == [
        "classifier.weight",
        "classifier.bias",
    ]
    x = torch.rand(8, 3, size, size)
    z = (x - MEAN) / STD
    with torch.no_grad():
        pairs[-2][0].normal_(std=0.1)  # a head that starts at zero would tell nothing
        settle(theirs, z)
        for a, b in pairs:
            b.copy_(a)
        expected = theirs.eval()(z)
        assert expected.std() > 0.01
        close = {"rtol": 1e-4, "atol": 1e-4 * float(expected.abs().max())}
        torch.testing.assert_close(ours.eval()(x), expected, **close)
        assert ours.featurizer(x).shape == (8, features)


def test_googlenet_has_one_classifier_and_its_own_normalisation() -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.googlenet(init_weights=True, transform_input=True)
    net = build("googlenet")
    assert not any("aux" in n for n in net.state_dict())
    aux = {n for n in theirs.state_dict() if n.startswith("aux")}
    assert aux
    x = torch.rand(8, 3, 64, 64)
    z = (x - MEAN) / STD
    with torch.no_grad():
        theirs.fc = nn.Identity()
        settle(theirs, z)
        expected = theirs.eval()(z)
        state = {f"backbone.{n}": t for n, t in theirs.state_dict().items() if n not in aux}
        net.featurizer.load_state_dict(state)
        found = net.eval().featurizer(x)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.std()))
        assert (found - theirs(x)).abs().max() > 0.1 * expected.std()


def test_files_with_other_classifiers_and_auxiliary_ones_load(tmp_path: Path) -> None:
    torch.manual_seed(1)
    donor = torchvision.models.googlenet(init_weights=False).state_dict()
    save_file(donor, tmp_path / "w.safetensors")
    net = build("googlenet", weights=str(tmp_path / "w.safetensors"))
    for name, tensor in backbone_of(net.featurizer).state_dict().items():
        assert torch.equal(tensor, donor[name]), name


def test_a_vit_is_built_for_the_image_size_and_its_positions_are_interpolated(
    tmp_path: Path, published: dict[str, Tensor]
) -> None:
    torch.manual_seed(1)
    donor = torchvision.models.vit_b_32(num_classes=3)
    state = donor.state_dict()
    # as in the files of the time: the two layers of a perceptron had names
    old = {
        n.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): t
        for n, t in state.items()
    }
    assert old.keys() != state.keys()
    torch.save(old, tmp_path / "w.pth")
    published |= old
    expected = interpolate_embeddings(64, 32, dict(state))["encoder.pos_embedding"]
    for weights in (str(tmp_path / "w.pth"), "default"):
        net = build("vit_b_32", 64, weights=weights)
        ours = backbone_of(net.featurizer).state_dict()
        assert ours["encoder.pos_embedding"].shape == (1, 1 + 2 * 2, 768)
        torch.testing.assert_close(ours["encoder.pos_embedding"], expected)
        for name in set(ours) - {"encoder.pos_embedding"}:
            assert torch.equal(ours[name], state[name]), name
    torch.save(state, tmp_path / "w.pth")
    same = build("vit_b_32", 224, weights=str(tmp_path / "w.pth"))
    ours = backbone_of(same.featurizer).state_dict()
    assert torch.equal(ours["encoder.pos_embedding"], state["encoder.pos_embedding"])


def test_old_names_of_a_densenet_are_known(published: dict[str, Tensor]) -> None:
    torch.manual_seed(1)
    state = torchvision.models.densenet121().state_dict()
    published |= {
        re.sub(r"(denselayer\d+)\.(norm|conv)([12])", r"\1.\2.\3", n): t for n, t in state.items()
    }
    assert published.keys() != state.keys()
    ours = backbone_of(build("densenet121", weights="default").featurizer).state_dict()
    assert all(torch.equal(ours[n], state[n]) for n in ours)


def test_published_weights_by_name(published: dict[str, Tensor]) -> None:
    torch.manual_seed(1)
    published |= torchvision.models.shufflenet_v2_x0_5().state_dict()
    for weights in ("default", "IMAGENET1K_V1"):
        net = build("shufflenet_v2_x0_5", weights=weights)
        ours = backbone_of(net.featurizer).state_dict()
        assert all(torch.equal(ours[n], published[n]) for n in ours)
    with pytest.raises(UserError, match="no weights file 'IMAGENET1K_V2'"):
        build("shufflenet_v2_x0_5", weights="IMAGENET1K_V2")


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    state = torchvision.models.resnet18().state_dict()
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"\d+ missing \(conv1\.0\.weight, .*unexpected \(conv1\."):
        build("shufflenet_v2_x0_5", weights=str(tmp_path / "w.pth"))
    state["bn1.weight"][0] = torch.nan
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"1 with numbers that are not finite \(bn1\.weight\);"):
        build("resnet18", weights=str(tmp_path / "w.pth"))


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "convnext_tiny"])
def test_other_channels_change_the_first_convolution_alone(name: str, tmp_path: Path) -> None:
    state = build(name).state_dict()
    net = build(name, channels=2)
    shapes = {n: t.shape for n, t in net.state_dict().items() if t.shape != state[n].shape}
    first, shape = shapes.popitem()
    assert not shapes
    assert shape == (len(state[first]), 2, *state[first].shape[2:])
    assert net.state_dict().keys() == state.keys()
    layer = next(m for m in net.modules() if isinstance(m, Normalize))
    assert layer.mean.flatten().tolist() == layer.std.flatten().tolist() == [0.5] * 2
    library = backbone_of(build(name).featurizer).state_dict()
    save_file(library, tmp_path / "w.safetensors")
    net = build(name, channels=2, weights=str(tmp_path / "w.safetensors"))
    key = first.removeprefix("featurizer.backbone.")
    for channel in (0, 1):
        found = backbone_of(net.featurizer).state_dict()[key][:, channel]
        torch.testing.assert_close(found, library[key].mean(1) * 1.5)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        (
            "convnext_tin",
            32,
            r"^torchvision has no backbone 'convnext_tin'; did you mean 'convnext_tiny' or .*"
            r"\? torchvision\.models\.list_models\(module=torchvision\.models\) has them all$",
        ),
        ("fcn_resnet50", 32, "torchvision has no backbone 'fcn_resnet50'; did you mean "),
        ("squeezenet1_1", 32, "'squeezenet1_1' ends in no linear layer .*; write another"),
        ("mnasnet0_5", 32, "takes no averaged weights .*; write model=timm"),
        ("vit_b_32", 33, r"'vit_b_32' cannot be built for .* \(3, 33, 33\): .*; write another"),
        ("alexnet", 16, r"'alexnet' cannot be built for images of shape \(3, 16, 16\): .*; write"),
        (
            "maxvit_t",
            32,
            r"'maxvit_t' cannot be built for .*not divisible by partition size 7.*; writ",
        ),
    ],
)
def test_what_cannot_be_built_is_one_line(name: str, size: int, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build(name, size)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_images_for_a_vit_are_square() -> None:
    with pytest.raises(UserError, match="'vit_b_32' takes square images, not 64×32"):
        build_model("torchvision", (3, 64, 32), 7, backbone="vit_b_32")


def test_weights_of_another_normalisation_are_refused() -> None:
    with pytest.raises(UserError, match=r"^model\.weights=IMAGENET1K_FEATURES: .*=default$"):
        build("vgg16", weights="IMAGENET1K_FEATURES")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", torchvision.models.list_models(module=torchvision.models, exclude=["*128gf", "vit_h*"])
)
def test_every_network_builds_or_says_why(name: str) -> None:
    try:
        net = build(name, 224).eval()
    except UserError as error:
        assert name.startswith(("squeezenet", "mnasnet")), error  # noqa: PT017
        return
    with torch.no_grad():
        assert net(torch.rand(1, 3, 224, 224)).shape == (1, 7)
