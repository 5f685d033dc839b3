"""freeze_bn and dropout: statistics that never move, names that never change."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dgavg.averaging import RunningMean
from dgavg.averaging.batchnorm import recalibrate_batchnorm
from dgavg.evaluation import Scorer, Split
from dgavg.models import Featurizer, Model, build_model
from dgavg.models.model import backbone_of
from dgavg.trainer import Candidate

KINDS = {
    "resnet18": {},
    "torchvision": {"backbone": "shufflenet_v2_x0_5"},
    "timm": {"backbone": "tf_efficientnet_lite0"},  # whose layers norm and activate at once
}

KEYS = ("weight", "bias")


def build(name: str = "resnet18", **settings: object) -> Model:
    torch.manual_seed(0)
    return build_model(name, (3, 32, 32), 4, **KINDS[name], **settings)


def moved(net: Model) -> Model:
    """The model with statistics as if it came from somewhere."""
    torch.manual_seed(1)
    for layer in norms(net):
        layer.running_mean.normal_(std=0.1)
        layer.running_var.uniform_(0.5, 2)
    return net


def norms(net: nn.Module) -> list[_BatchNorm]:
    return [m for m in net.modules() if isinstance(m, _BatchNorm)]


def statistics(net: nn.Module) -> dict[str, Tensor]:
    return {n: b.clone() for n, b in net.named_buffers() if "running" in n or "num_batches" in n}


def step(net: nn.Module, x: Tensor, lr: float = 1e-2) -> None:
    net.zero_grad()
    net(x).square().mean().backward()
    with torch.no_grad():
        for p in net.parameters():
            p.sub_(p.grad, alpha=lr)


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name


@pytest.mark.parametrize("name", KINDS)
def test_frozen_statistics_never_move_while_scale_and_shift_learn(name: str) -> None:
    net, free = moved(build(name, freeze_bn=True)), moved(build(name))
    assert net.state_dict().keys() == free.state_dict().keys()
    before, x = statistics(net), torch.rand(8, 3, 32, 32)
    scale = {n: p.clone() for n, p in net.named_parameters()}
    for module in (net, net.train(), net.eval().train(), net.train(True)):
        assert module.training
        assert module.featurizer.training
        assert not any(layer.training for layer in norms(module))
    assert all(m.training for m in net.modules() if not isinstance(m, _BatchNorm))
    step(net, x)
    step(free, x)
    assert_same(statistics(net), before)
    assert not torch.equal(
        statistics(free)[next(iter(before))], before[next(iter(before))]
    )  # so the input would have moved them
    assert all(p.requires_grad for p in net.parameters())
    affine = [f"{n}.{key}" for n, m in net.named_modules() if m in norms(net) for key in KEYS]
    learned = [not torch.equal(net.get_parameter(n), scale[n]) for n in affine]
    assert sum(learned) > len(learned) / 2


def test_training_normalises_by_the_frozen_statistics() -> None:
    net = moved(build(freeze_bn=True))
    x = torch.rand(8, 3, 32, 32)
    in_training = net(x)
    torch.testing.assert_close(in_training, net.eval()(x), rtol=0, atol=0)
    bn, maps = backbone_of(net.featurizer).bn1, torch.rand(8, 64, 4, 4)
    net.train()
    expected = F.batch_norm(maps, bn.running_mean, bn.running_var, bn.weight, bn.bias)
    torch.testing.assert_close(bn(maps), expected)


def test_twins_are_frozen_too_and_layers_put_in_later_are_not() -> None:
    net = build(freeze_bn=True)
    for twin in (copy.deepcopy(net), copy.deepcopy(net.featurizer)):
        twin.eval().train()
        assert not any(layer.training for layer in norms(twin))
        assert twin.training
    featurizer = net.featurizer
    featurizer.backbone = nn.Sequential(nn.BatchNorm2d(3), featurizer.backbone)
    net.train()
    assert [layer.training for layer in norms(net)] == [True] + [False] * (len(norms(net)) - 1)


def test_a_new_model_without_freezing_trains_its_statistics() -> None:
    net = build()
    assert all(m.training for m in net.modules())
    assert not any(hasattr(m, "frozen") for m in net.modules())


@pytest.mark.parametrize("policy", ["recalibrate", "average", "keep"])
def test_averages_of_a_frozen_model_keep_its_statistics(policy: str) -> None:
    net = moved(build(freeze_bn=True))
    before, mean = statistics(net), RunningMean(net, buffers="average")
    for i in range(3):
        torch.manual_seed(i)
        step(net, torch.rand(8, 3, 32, 32))
        mean.update(net)
    pixels = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    calls = []

    def pooled() -> list[Tensor]:
        calls.append(1)
        return [torch.rand(8, 3, 32, 32)]

    scorer = Scorer(net, {"s/out": Split(pixels, torch.zeros(8, dtype=torch.int64))}, pooled)
    scorer.score({"sma": Candidate(mean.weights(), policy)})
    found = scorer.weights("sma")
    for name in before:
        torch.testing.assert_close(found[name], before[name], rtol=1e-6, atol=0)
    assert not calls  # there is nothing to recalibrate
    weights = dict(net.named_parameters())
    assert any(not torch.equal(found[name], p) for name, p in weights.items())


def test_recalibration_leaves_frozen_layers_alone_and_does_the_others() -> None:
    net = moved(build(freeze_bn=True))
    inside = nn.BatchNorm2d(3)
    net.featurizer.backbone = nn.Sequential(inside, net.featurizer.backbone)
    before = statistics(net)
    x = torch.rand(32, 3, 32, 32)
    recalibrate_batchnorm(net.train(), [x])
    after = statistics(net)
    changed = [n for n in before if not torch.equal(before[n], after[n])]
    assert changed == ["featurizer.backbone.0.running_mean", "featurizer.backbone.0.running_var"]


@pytest.mark.parametrize("name", KINDS)
def test_dropout_is_the_last_thing_before_the_classifier_and_changes_no_name(name: str) -> None:
    net, plain = build(name, dropout=0.5), build(name)
    assert list(net.state_dict()) == list(plain.state_dict())
    assert isinstance(net.classifier, nn.Linear)
    assert isinstance(net.featurizer[-1], nn.Dropout)
    assert not any(m is net.featurizer[-1] for m in plain.featurizer.children())
    assert "dropout" not in dict(plain.featurizer.named_children())
    x = torch.rand(16, 3, 32, 32)
    torch.testing.assert_close(net.eval()(x), plain.eval()(x), rtol=0, atol=0)
    for layer in [*norms(net), *norms(plain)]:
        layer.momentum = 0.0
    torch.manual_seed(2)
    full = plain.train().featurizer(x)
    torch.manual_seed(2)
    features = net.train().featurizer(x)
    kept = features != 0
    assert 0.3 < kept.float().mean() / (full != 0).float().mean() < 0.7
    if name == "resnet18":  # which draws nothing else
        torch.testing.assert_close(features[kept], 2 * full[kept])


def test_parts_have_names_of_their_own() -> None:
    parts = Featurizer(nn.Conv2d(3, 2, 1), (0.5,) * 3, (1, 1, 1), freeze_bn=True, dropout=0.1)
    assert list(dict(parts.named_children())) == ["normalize", "backbone", "dropout"]
    assert parts.dropout.p == 0.1
