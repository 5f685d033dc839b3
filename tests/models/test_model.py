"""What holds for every model: the parts, the state dict, twins, precision, small batches."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from dgavg.models import MODELS, Featurizer, Model, Normalize, build_model
from dgavg.models.model import backbone_of

SETTINGS = {
    "timm": {"backbone": "tf_efficientnet_lite0"},
    "torchvision": {"backbone": "shufflenet_v2_x0_5"},
    "domainbed": {"weights": None, "resnet18": True},
}
SMALL = [name for name in MODELS if name != "resnet50"]
FROZEN = "domainbed"  # its batch norm is, by default


def build(name: str, channels: int = 3, size: int = 32, classes: int = 5) -> Model:
    torch.manual_seed(0)
    return build_model(name, (channels, size, size), classes, **SETTINGS.get(name, {}))


def train_step(net: Model, x: Tensor) -> None:
    """One plain update, so that weights and statistics leave their initial values."""
    net.train()
    net(x).square().mean().backward()
    with torch.no_grad():
        for p in net.parameters():
            p.sub_(p.grad, alpha=0.1)


def test_forward_classifies_the_features() -> None:
    net = Model(nn.Flatten(), nn.Linear(4, 3))
    x = torch.rand(2, 1, 2, 2)
    torch.testing.assert_close(net(x), net.classifier(x.reshape(2, 4)))


def test_normalize_is_per_channel_and_keeps_out_of_the_state_dict() -> None:
    layer = Normalize((0.5, 0.1), (0.25, 2.0))
    x = torch.rand(3, 2, 4, 4)
    y = layer(x)
    torch.testing.assert_close(y[:, 0], (x[:, 0] - 0.5) / 0.25)
    torch.testing.assert_close(y[:, 1], (x[:, 1] - 0.1) / 2.0)
    assert layer.state_dict() == {}
    assert len(list(layer.buffers())) == 2  # so that they follow .to(device)
    assert "mean=[0.5" in repr(layer)


@pytest.mark.parametrize(
    ("mean", "std", "layers"), [((0, 0), (1, 1), 0), ((0, 0.1), (1, 1), 1), ((0, 0), (1, 2), 1)]
)
def test_normalisation_by_zero_and_one_adds_no_layer(
    mean: tuple[float, ...], std: tuple[float, ...], layers: int
) -> None:
    backbone = nn.Conv2d(2, 2, 1)
    net = Featurizer(backbone, mean, std)
    assert sum(isinstance(m, Normalize) for m in net.modules()) == layers
    assert len(list(net.children())) == 1 + layers
    assert list(net.state_dict()) == ["backbone.weight", "backbone.bias"]
    assert backbone_of(net) is backbone
    if layers:
        assert isinstance(next(net.children()), Normalize)
    assert backbone_of(backbone) is backbone


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("name", SMALL)
def test_eight_rows_of_any_channels_train(name: str, channels: int) -> None:
    net = build(name, channels)
    x = torch.rand(8, channels, 32, 32)
    assert net.training
    if name != FROZEN:
        assert all(m.training for m in net.modules())
    features = net.featurizer(x)
    assert features.ndim == 2
    assert features.shape[1] == net.classifier.in_features
    assert net(x).shape == (8, 5)
    train_step(net, x)
    assert all(torch.isfinite(p).all() and p.grad is not None for p in net.parameters())


@pytest.mark.parametrize(("name", "size"), [(n, s) for n in ("mlp", "cnn") for s in (8, 28, 224)])
def test_sizes_of_the_small_models(name: str, size: int) -> None:
    assert build(name, 1, size)(torch.rand(8, 1, size, size)).shape == (8, 5)


@pytest.mark.parametrize(("name", "size"), [("resnet18", 8), ("timm", 8), ("timm", 224)])
def test_sizes_of_the_large_models(name: str, size: int) -> None:
    net = build(name, 3, size).eval()
    with torch.no_grad():
        assert net(torch.rand(1, 3, size, size)).shape == (1, 5)


@pytest.mark.parametrize("name", SMALL)
def test_a_new_model_has_untouched_statistics(name: str) -> None:
    for module in build(name).modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.num_batches_tracked == 0
            assert (module.running_mean == 0).all()
            assert (module.running_var == 1).all()


@pytest.mark.parametrize("name", SMALL)
def test_the_state_dict_has_only_what_is_learned(name: str) -> None:
    net = build(name)
    parameters = {n for n, _ in net.named_parameters()}
    others = set(net.state_dict()) - parameters
    assert all(n.split(".")[-1].startswith(("running_", "num_batches")) for n in others)
    assert all(n.startswith(("featurizer.", "classifier.")) for n in net.state_dict())


@pytest.mark.parametrize("name", SMALL)
def test_a_twin_can_share_or_borrow_every_tensor(name: str) -> None:
    net = build(name)
    x = torch.rand(8, 3, 32, 32)
    tensors = [*net.parameters(), *net.buffers()]
    twin = copy.deepcopy(net, {id(t): t for t in tensors})
    assert all(a is b for a, b in zip(tensors, [*twin.parameters(), *twin.buffers()], strict=True))

    initial = {n: t.clone() for n, t in net.state_dict().items()}
    borrower = copy.deepcopy(net)
    train_step(net, x)
    net.eval(), twin.eval(), borrower.eval()
    assert not torch.equal(borrower(x), net(x))
    torch.testing.assert_close(twin(x), net(x), rtol=0, atol=0)
    borrower.load_state_dict(net.state_dict(), assign=True)
    torch.testing.assert_close(borrower(x), net(x), rtol=0, atol=0)
    assert borrower.classifier.weight.data_ptr() == net.classifier.weight.data_ptr()
    net.load_state_dict(initial, assign=True)
    assert not torch.equal(borrower(x), net(x))


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_autocast_stays_near_float32(name: str) -> None:
    net = build(name).eval()
    x = torch.rand(8, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = net(x)
    with torch.no_grad():
        full = net(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, rtol=0.1, atol=0.05 * float(full.abs().max()))


def test_the_import_reads_no_image_library() -> None:
    check = (
        "import sys, dgavg.models\n"
        "assert not {'torchvision', 'timm', 'safetensors'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
