"""A trial of a stack: what can't be run for several models, or is not the same then, is refused."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn
from torchvision.ops import StochasticDepth

from dgavg import UserError, leave_one_domain_out
from dgavg.models import Model, build_model
from dgavg.models.stack import Stack
from dgavg.stacked import StackedRun
from dgavg.trial import try_out

SHAPE = (3, 16, 16)


class NoBatches:
    """A trial takes images of its own."""

    names, classes, epoch_length = ("a", "b"), 5, 1


def stacked(build, precision="fp32", count=3):
    """The run of a stack of models, and those."""
    torch.manual_seed(0)
    models = [build() for _ in range(count)]
    stack = Stack(models).train()
    return StackedRun("basic", stack, NoBatches(), steps=1, precision=precision), models


def tried(build, precision="fp32", count=3):
    """The run of a stack, after its trial."""
    run, models = stacked(build, precision, count)
    try_out(run, models, SHAPE)
    return run


class Layer(nn.Module):
    """A convolution and the mean of each channel."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 3)
        self.scale = torch.rand(8)  # no buffer: another for each model
        self.share = random.random()
        self.register_buffer("mean", torch.zeros(8))

    def features(self, x):
        return self.layer(x).mean((2, 3))


class Drawing(Layer):
    def forward(self, x):
        return self.features(x) + torch.rand(8)


class Choosing(Layer):
    def forward(self, x):
        found = self.features(x)
        return found if found.mean() > 0.5 else -found


class Scaled(Layer):
    def forward(self, x):
        return self.features(x) * self.scale


class ScaledInTraining(Layer):
    def forward(self, x):
        return self.features(x) * (self.scale if self.training else 1)


class ScaledInScoring(Layer):
    def forward(self, x):
        return self.features(x) * (1 if self.training else self.scale)


class Shared(Layer):
    def forward(self, x):
        return self.features(x) * self.share


class Thrown(Layer):
    def forward(self, x):
        return self.features(x) * random.random()


class Replaced(Layer):
    def forward(self, x):
        found = self.features(x)
        if self.training:
            self.mean = 0.5 * self.mean + 0.5 * found.detach().mean(0)
        return found


class Idle(Layer):
    """Draws what it does not use."""

    def forward(self, x):
        random.random()
        return self.features(x)


class Slope(torch.autograd.Function):
    """The identity, whose backward pass looks at a number."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, slope):
        return slope if slope.sum().item() > 0 else -slope


class Looking(Layer):
    def forward(self, x):
        return Slope.apply(self.features(x))


class Written(Layer):
    def forward(self, x):
        found = self.features(x)
        if self.training:
            self.mean.mul_(0.5).add_(found.detach().mean(0))
        return found - self.mean


class Smooth(Layer):
    """As PReLU, which autocast does not cast, and vmap takes below autocast."""

    def __init__(self):
        super().__init__()
        self.smooth = nn.PReLU(8)

    def forward(self, x):
        return self.smooth(self.layer(x)).mean((2, 3))


def headed(*layers):
    return lambda: Model(nn.Sequential(*(layer() for layer in layers)), nn.Linear(8, 5))


@pytest.mark.parametrize(
    ("layers", "precision", "reason"),
    [
        ([Drawing], "fp32", "random operation"),
        ([Choosing], "fp32", "data-dependent control flow"),
        ([lambda: StochasticDepth(0.2, "row"), Layer], "fp32", "random"),
        ([lambda: nn.BatchNorm2d(3, momentum=None), Written], "fp32", "item()"),
        ([Looking], "fp32", "item()"),
        ([Smooth], "bf16", "prelu: Type promoting not supported"),
    ],
)
def test_forward_code_that_can_not_be_run_for_several_is_refused(layers, precision, reason):
    with pytest.raises(UserError) as found:
        tried(headed(*layers), precision)
    assert str(found.value).startswith("stack: the model's forward pass can't be taken for several")
    assert reason in str(found.value)
    assert str(found.value).endswith(": write stack=1")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "layer", [Scaled, ScaledInTraining, ScaledInScoring, Shared, Thrown, Replaced]
)
def test_what_is_not_the_same_for_several_is_refused(layer):
    with pytest.raises(UserError, match=r"not do the same for several at once as alone: .*stack=1"):
        tried(headed(layer))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_trial_leaves_nothing_behind(precision):
    state, own = torch.get_rng_state(), random.getstate()
    stack = tried(headed(Written), precision).model
    torch.manual_seed(0)
    random.setstate(own)
    expected = Stack([headed(Written)() for _ in range(3)]).state_dict()
    assert all(v.equal(expected[k]) for k, v in stack.state_dict().items())
    assert all(p.grad is None for p in stack.parameters())
    assert stack.training
    torch.set_rng_state(state)


def test_a_trial_draws_no_number_of_the_run():
    run, models = stacked(headed(Idle))
    before = random.getstate()
    try_out(run, models, SHAPE)
    assert random.getstate() == before


@pytest.mark.parametrize("name", ["cnn", "resnet18", "resnet50"])
def test_networks_that_dgavg_builds_pass(name):
    weights = {} if name == "cnn" else {"weights": None}
    tried(lambda: build_model(name, SHAPE, 5, **weights), count=2)


def test_memory_that_runs_out_is_no_mistake_of_the_user(monkeypatch):
    def full(self, x):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(Written, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        tried(headed(Written))


def test_runs_are_tried_out_before_a_file_is_written(tmp_path):
    def build(shape, classes):
        return Model(nn.Sequential(nn.Conv2d(shape[0], 8, 3), Tail()), nn.Linear(8, classes))

    class Tail(nn.Module):
        def forward(self, x):
            return x.mean((2, 3)) * random.random()

    with pytest.raises(UserError, match="stack: the model does not do the same"):
        leave_one_domain_out(
            "basic", model=build, seeds=[0, 1], settings={"stack": 2}, runs=tmp_path, quiet=True
        )
    assert not list(tmp_path.rglob("*.jsonl"))
