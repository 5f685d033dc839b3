"""The two small networks, each against plain torch.nn.functional."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgavg.models import Model, build_model


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def scramble(net: Model) -> dict[str, Tensor]:
    """Random values in every tensor, so that none is told from another by its initial value."""
    torch.manual_seed(1)
    for tensor in net.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(
                torch.rand_like(tensor) - 0.3 if tensor.ndim > 1 else torch.rand_like(tensor)
            )
    return net.state_dict()


def test_cnn_takes_batch_norm_in_place_of_group_norm() -> None:
    plain, normed = (build_model("cnn", (1, 28, 28), 10, batchnorm=b) for b in (False, True))
    kinds = [[type(m).__name__ for m in net.featurizer] for net in (plain, normed)]
    assert kinds[1] == [k.replace("GroupNorm", "BatchNorm2d") for k in kinds[0]]
    assert kinds[1].count("BatchNorm2d") == 4
    assert normed(torch.rand(2, 1, 28, 28)).shape == (2, 10)


def test_cnn_is_domainbeds() -> None:
    net = build_model("cnn", (2, 28, 28), 10).eval()
    state = scramble(net)
    assert count(net) == 64 * 19 + 128 * (64 * 9 + 1) + 2 * 128 * (128 * 9 + 1) + 2 * 448 + 1290

    weights = list(state.values())
    x = images = torch.rand(4, 2, 28, 28)
    for layer, stride in enumerate((1, 2, 1, 1)):
        w, b, scale, shift = weights[4 * layer : 4 * layer + 4]
        x = F.relu(F.conv2d(x, w, b, stride=stride, padding=1))
        x = F.group_norm(x, 8, scale, shift)
    features = x.mean((2, 3))
    torch.testing.assert_close(net.featurizer(images), features)
    torch.testing.assert_close(net(images), F.linear(features, *weights[16:]), rtol=1e-4, atol=1e-4)
    assert len(weights) == 18


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("batchnorm", [True, False])
def test_mlp_is_linear_norm_relu(batchnorm: bool, depth: int, training: bool) -> None:
    net = build_model("mlp", (2, 4, 6), 5, width=16, depth=depth, batchnorm=batchnorm)
    weights = list(scramble(net).values())
    sizes = [48, *[16] * depth]
    hidden = sum(16 * (n + 1 + 2 * batchnorm) for n in sizes[:-1])
    assert count(net) == hidden + 5 * (sizes[-1] + 1)

    images = torch.rand(8, 2, 4, 6)
    x = images.reshape(8, 48)
    given = iter([w.clone() for w in weights])
    for _ in range(depth):
        x = F.linear(x, next(given), next(given))
        if batchnorm:
            scale, shift, mean, variance, _ = (next(given) for _ in range(5))
            x = F.batch_norm(x, mean, variance, scale, shift, training=training)
        x = F.relu(x)
    net.train(training)
    torch.testing.assert_close(net(images), F.linear(x, next(given), next(given)))
    assert next(given, None) is None


def test_mlp_defaults() -> None:
    net = build_model("mlp", (1, 8, 8), 10)
    assert count(net) == 256 * (65 + 2) + 256 * (257 + 2) + 10 * 257
    assert not any(isinstance(m, nn.Dropout) for m in net.modules())


def test_mlp_dropout_follows_relu_and_only_in_training() -> None:
    net = build_model("mlp", (1, 8, 8), 10, dropout=0.75)
    drops = [m for m in net.featurizer.modules() if isinstance(m, nn.Dropout)]
    assert [m.p for m in drops] == [0.75, 0.75]
    assert net.state_dict().keys() == build_model("mlp", (1, 8, 8), 10).state_dict().keys()
    assert isinstance(net.featurizer[-1][-1], nn.Dropout)
    x = torch.rand(64, 1, 8, 8)
    dead = (net.featurizer(x) == 0).float().mean()
    net.eval()
    assert dead > (net.featurizer(x) == 0).float().mean() + 0.2
    torch.testing.assert_close(net(x), net(x))
