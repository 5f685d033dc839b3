"""Stacks of networks with any forward code against the same networks, one by one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dgavg import UserError
from dgavg.models import Model, build_model
from dgavg.models.replicas import Replicas
from dgavg.models.stack import Stack, part

COUNT, ROWS, SHAPE = 3, 6, (3, 8, 8)


class Odd(nn.Module):
    """Forward code that no list of layers describes, and layers with unusual settings."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding="same", bias=False, padding_mode="reflect")
        self.grouped = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4)
        self.norm = nn.BatchNorm2d(8, momentum=0.3, eps=1e-3)
        self.bare = nn.BatchNorm2d(16, affine=False)
        self.forgetful = nn.BatchNorm2d(8, track_running_stats=False)
        self.along = nn.Conv1d(8, 8, 3)
        self.groups = nn.GroupNorm(num_groups=4, num_channels=16)
        self.gate = nn.Linear(16, 16)
        self.mix = nn.Parameter(torch.ones(8, 16, 1, 1))
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("seen", torch.zeros(()))
        self.constant = torch.linspace(-1, 1, 32).view(2, 16)

    def forward(self, x):
        if self.training:
            self.seen += x.detach().mean()
        x = self.first(x)
        x = x + self.scale * F.relu_(self.norm(self.grouped(x)))
        x = torch.cat([x, self.forgetful(x).square()], dim=1)
        x = self.groups(self.bare(x))
        x = F.group_norm(x, 2, weight=self.constant[0].to(x))
        x = x + F.group_norm(self.constant.to(x), 2, self.groups.weight)[0, :, None, None]
        x = x * self.gate(x.mean((2, 3)))[:, :, None, None].sigmoid()
        x = F.conv2d(x, weight=self.mix) + F.adaptive_max_pool2d(x, 1)[:, :8]
        return self.along(x.flatten(2)).mean(2)


def odd():
    return Model(Odd(), nn.Linear(8, 5))


def flat(*layers):
    return Model(nn.Sequential(nn.Flatten(), *layers), nn.Linear(8, 5))


def cnn(**settings):
    return build_model("cnn", SHAPE, 5, **settings)


BUILDERS = {
    "odd": odd,
    "cnn": cnn,
    "cnn with batch norm": lambda: cnn(batchnorm=True),
    "resnet18": lambda: build_model("resnet18", SHAPE, 5),
    "mobile": lambda: build_model("timm", SHAPE, 5, backbone="mobilenetv3_small_050"),
    "bare mlp": lambda: flat(nn.Linear(192, 8), nn.BatchNorm1d(8, affine=False)),
    "rows": lambda: Model(nn.Sequential(nn.Linear(8, 4), nn.Flatten()), nn.Linear(96, 5)),
}


def models(build, count=COUNT):
    found = []
    for seed in range(count):
        torch.manual_seed(seed)
        model = build().train()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        found.append(model)
    return found


def images(dtype=torch.float64):
    random = torch.Generator().manual_seed(7)
    x = torch.rand(COUNT, ROWS, *SHAPE, generator=random, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, 5, (COUNT, ROWS), generator=random)


def trained(model, x, y, steps=2):
    """Two steps of plain gradient descent on the sum of the mean losses of `y`'s parts."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y.flatten()) * (y.numel() // ROWS)).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("name", BUILDERS)
def test_each_model_trains_as_alone(name):
    x, y = images()
    each = [model.double() for model in models(BUILDERS[name])]
    stack = trained(Stack(each), x.flatten(0, 1), y)
    assert not stack.layered
    for r, model in enumerate(each):
        trained(model, x[r], y[r])
        mine, theirs = part(stack.state_dict(), r), model.state_dict()
        assert mine.keys() == theirs.keys()
        for key, tensor in theirs.items():
            torch.testing.assert_close(mine[key], tensor, rtol=1e-7, atol=1e-9)
    stack.eval()
    logits = stack(x.flatten(0, 1)).unflatten(0, (COUNT, ROWS))
    for r, model in enumerate(each):
        torch.testing.assert_close(logits[r], model.eval()(x[r]), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["odd", "cnn with batch norm"])
def test_no_model_depends_on_the_data_of_another(name):
    x, y = images()
    each = [model.double() for model in models(BUILDERS[name])]
    stacks = [Stack(each), Stack(each)]
    trained(stacks[0], x.flatten(0, 1), y)
    x[1], y[1] = 100 * x[1].flip(0), y[1].flip(0)
    trained(stacks[1], x.flatten(0, 1), y)
    before, after = (stack.state_dict() for stack in stacks)
    for r in (0, 2):
        theirs = part(after, r)
        assert all(tensor.equal(theirs[key]) for key, tensor in part(before, r).items())
    assert not part(before, 1)["classifier.weight"].equal(part(after, 1)["classifier.weight"])


@pytest.mark.parametrize("name", ["odd", "cnn", "cnn with batch norm"])
def test_precision_is_that_of_a_model_alone(name):
    """Products and norms in bfloat16, as autocast has them."""
    x, y = images(torch.float32)
    each = models(BUILDERS[name])
    stack = Stack(each)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = stack.featurizer(x.flatten(0, 1))
        loss = F.cross_entropy(stack.classifier(features).float(), y.flatten())
        alone = torch.cat([model.featurizer(x[r]) for r, model in enumerate(each)])
    assert features.dtype == alone.dtype == torch.bfloat16
    torch.testing.assert_close(features, alone, rtol=0.05, atol=0.05)
    loss.backward()
    assert {p.grad.dtype for p in stack.parameters()} == {torch.float32}


def test_constants_are_not_saved_and_layers_keep_their_place():
    each = models(BUILDERS["resnet18"], 2)
    stack = Stack(each)
    assert isinstance(stack.featurizer, Replicas)
    names = {name.replace(".stacked", "", 1) for name in stack.state_dict()}
    assert names == each[0].state_dict().keys()
    hidden = {name for name, _ in stack.named_buffers()} - stack.state_dict().keys()
    assert hidden == {f"featurizer.stacked.normalize.{key}" for key in ("mean", "std")}
    assert all(tensor.shape[0] == 2 for tensor in stack.state_dict().values())


def test_what_is_lent_is_the_stack_itself():
    each = models(BUILDERS["resnet18"], 2)
    stack = Stack(each)
    stack.lend(each)
    for r, model in enumerate(each):
        for key, tensor in part(stack.state_dict(), r).items():
            assert model.state_dict()[key].data_ptr() == tensor.data_ptr()
    with torch.no_grad():
        stack.classifier.stacked.weight[1] += 1
    assert each[1].classifier.weight.equal(stack.classifier.stacked.weight[1])


def shared():
    layer = nn.Conv2d(3, 3, 1)
    return Model(nn.Sequential(layer, nn.ReLU(), layer, nn.Flatten()), nn.Linear(192, 5))


def hooked():
    model = cnn()
    model.featurizer[0].register_forward_hook(lambda module, args, out: 2 * out)
    return model


def hooked_as_a_whole():
    model = cnn()
    model.featurizer.register_forward_pre_hook(lambda module, args: None)
    return model


def partly_frozen():
    model = cnn()
    model.featurizer[0].weight.requires_grad_(False)
    return model


def headed(featurizer):
    return Model(featurizer, nn.Linear(192, 5))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (shared, "a layer is used twice"),
        (hooked, r"Conv2d\(3, 64.*\) has hooks"),
        (hooked_as_a_whole, "Sequential has hooks"),
        (partly_frozen, r"Conv2d\(3, 64.*\) is frozen"),
        (lambda: build_model("resnet18", SHAPE, 5, freeze_bn=True), r"BatchNorm2d\(64.* is frozen"),
        (lambda: build_model("resnet18", SHAPE, 5, dropout=0.1), r"Dropout\(p=0\.1.* other masks"),
        (lambda: headed(nn.Sequential(nn.Dropout2d(0.2), nn.Flatten())), "Dropout2d.* other masks"),
    ],
)
def test_a_network_that_a_stack_would_change_is_refused(build, message):
    with pytest.raises(UserError, match=f"stack: .*{message}.*write stack=1") as found:
        Stack([build(), build()])
    assert "\n" not in str(found.value)


def test_a_layer_of_no_model_is_run_as_it_is():
    """Tensors that forward code makes itself have no axis of models."""
    x, _ = images()
    fixed = torch.arange(32.0, dtype=torch.float64).view(2, 8, 2)

    class Fixed(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :2] + F.group_norm(fixed, 2)[1, 2]

    found = Replicas([Fixed(), Fixed(), Fixed()])(x.flatten(0, 1))
    assert found.equal(x.flatten(0, 1).flatten(1)[:, :2] + F.group_norm(fixed, 2)[1, 2])
