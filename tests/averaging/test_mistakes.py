"""What can't be averaged, or not so, is refused with one line that says what to give instead."""

from __future__ import annotations

import os
import re

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dgavg.averaging import (
    ExponentialMean,
    GaussianPosterior,
    LatestMean,
    LossValley,
    PostHocMean,
    RunningMean,
    ValidatedMean,
    WeightSubspace,
    ensemble,
    greedy_soup,
    learned_soup,
    uniform_soup,
)


def refused(message):
    return pytest.raises(ValueError, match=f"^[^\n]*{re.escape(message)}[^\n]*$")


def net():
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


SOURCES = [
    (lambda m: list(m.parameters()), "the source is of type list"),
    (lambda m: m.parameters(), "the source is of type generator"),
    (lambda m: type(m), "the source is a class"),
    (lambda m: None, "the source is of type NoneType"),
]


@pytest.mark.parametrize(("source", "message"), SOURCES)
@pytest.mark.parametrize(
    "kind", [RunningMean, LatestMean, GaussianPosterior, WeightSubspace, PostHocMean]
)
def test_what_is_no_model(kind, source, message):
    model = net()
    message += ": give a model or a mapping of names to tensors"
    with refused(message):
        kind(source(model))
    average = kind(model)
    with refused(message):
        average.update(source(model))


def test_names_that_are_no_strings():
    with refused("0 is no name: give a mapping of names to tensors"):
        RunningMean({0: torch.ones(1)})


@pytest.mark.parametrize("entry", ["model", "state_dict"])
def test_a_checkpoint_around_a_state_dict(entry):
    saved = {"epoch": 3, entry: net().state_dict()}
    with refused(f"models[0]: no tensors, but a checkpoint: give its {entry!r} entry"):
        uniform_soup([saved, saved])
    with refused(f"no tensors, but a checkpoint: give its {entry!r} entry"):
        RunningMean(saved)
    with refused("no tensors, epoch is int: give a state dict"):
        RunningMean({"epoch": 3})


@pytest.fixture
def mesh(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh

    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def test_sharded_models(mesh):
    from torch.distributed.tensor import distribute_tensor

    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(distribute_tensor(torch.ones(2, 2), mesh))
    for use in (RunningMean, lambda m: uniform_soup([m]), lambda m: RunningMean(m.state_dict())):
        with refused("weight is a DTensor: sharded models are not supported"):
            use(model)


@pytest.mark.filterwarnings("ignore")
def test_quantised_tensors():
    model = nn.Linear(2, 2)
    model.register_buffer("q", torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8))
    for use in (RunningMean, lambda m: uniform_soup([m])):
        with refused("q is quantised: average before quantising"):
            use(model)


@pytest.mark.parametrize("k", [2.5, 0, float("inf"), float("nan")])
@pytest.mark.parametrize("kind", [LatestMean, WeightSubspace])
def test_no_number_of_samples(kind, k):
    with refused(f"k={k}: a number of models from 1 on"):
        kind(net(), k=k)


def test_a_whole_number_may_be_a_float():
    model = net()
    subspace = WeightSubspace(model, k=2.0)
    subspace.update(model)
    assert subspace.k == 2
    assert isinstance(subspace.k, int)


@pytest.mark.parametrize("name", ["buffers", "weights"])
@pytest.mark.parametrize("kind", [RunningMean, LatestMean, WeightSubspace, GaussianPosterior])
def test_an_expanded_tensor_is_written_once(kind, name):
    def expanded():
        model = nn.Linear(1, 1)
        model.register_buffer("scale", torch.zeros(1).expand(3))
        model.register_buffer("table", torch.zeros(2, 1).expand(2, 3))
        return model

    model = expanded()
    average = kind(model, buffers="average" if name == "weights" else "copy")
    for value in (1.0, 3.0):
        model.scale[0] = value
        model.table[:, 0] = torch.tensor([value, -value])
        average.update(model)
    target, expected = expanded(), 2.0 if name == "weights" else 3.0
    average.copy_to(target)
    assert target.scale.tolist() == [expected] * 3
    assert target.table.tolist() == [[expected] * 3, [-expected] * 3]
    with average.applied_to(model):
        assert model.scale.tolist() == [expected] * 3
    assert model.scale.tolist() == [3.0] * 3


def test_soups_of_one_model():
    model = nn.Linear(2, 2)
    loss = lambda m, x: m(x).square().mean()  # noqa: E731
    for one, name in ((model, "Linear"), (model.state_dict(), "OrderedDict"), (3, "int")):
        message = f"models is one {name}: give a list of models"
        with refused(message):
            uniform_soup(one)
        with refused(message):
            greedy_soup(one, lambda w: 0.0)
        with refused(message):
            learned_soup(one, model, loss, [torch.ones(1, 2)])
        with refused(message):
            ensemble(one, lambda w: w["weight"])


def test_soups_take_generators_and_module_lists():
    models = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    batches = [torch.ones(1, 2)]
    loss = lambda m, x: m(x).square().mean()  # noqa: E731
    for many in (models, list(models), (m for m in models)):
        assert greedy_soup(many, lambda w: 0.0, ties=True).members == (0, 1)
    found = learned_soup((m for m in models), models[0], loss, batches)
    assert found.coefficients.shape == (2,)
    mean = (models[0].weight + models[1].weight) / 2
    torch.testing.assert_close(uniform_soup(models)["weight"], mean.detach())


def test_a_class_instead_of_a_model_in_a_soup():
    with refused("models[0] is type: give a module, a mapping of tensors by name"):
        uniform_soup([nn.Flatten])


@pytest.mark.parametrize("kind", [RunningMean, PostHocMean])
def test_attach_with_its_arguments_swapped(kind):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = kind(model)
    with refused("Sequential is no optimizer: attach(optimizer, model)"):
        average.attach(model, optimizer)
    with refused("SGD is no model: attach(optimizer, model)"):
        average.attach(optimizer, optimizer)


def test_labels_beside_the_inputs_of_a_prediction():
    model = nn.Linear(2, 3)
    average = GaussianPosterior(model)
    average.update(model)
    x, y = torch.randn(4, 2), torch.tensor([0, 1, 2, 0])
    for inputs in ((x, y), [x, y], (x, y.float())):
        with refused("inputs has labels beside the inputs: give these alone, or [(x, y)]"):
            average.predict(model, inputs)
    whole = average.predict(model, [x, x[:2]], samples=1).shape  # two batches
    assert whole == (6, 3)
    assert average.predict(model, [(x, y)], samples=1).shape == (4, 3)
    embedding = nn.Sequential(nn.Embedding(3, 4), nn.Flatten(), nn.Linear(8, 3))
    average = GaussianPosterior(embedding)
    average.update(embedding)
    tokens = torch.zeros(4, 2, dtype=torch.int64)
    assert average.predict(embedding, [tokens, tokens], samples=1).shape == (8, 3)
    table = nn.Embedding(5, 3)
    average = GaussianPosterior(table)
    average.update(table)
    assert average.predict(table, [y, y], samples=1).shape == (8, 3)


@pytest.mark.parametrize("kind", [RunningMean, WeightSubspace, GaussianPosterior])
def test_names_of_buffers_that_are_none(kind):
    model = net()
    for source in (model, model.state_dict()):
        with refused("buffer_names has 1.runing_mean: no tensors of the source"):
            kind(source, buffer_names=frozenset({"1.runing_mean", "1.running_var"}))
        with refused("buffer_names='running': a set of names"):
            kind(source, buffer_names="running")


@pytest.mark.parametrize("kind", [RunningMean, WeightSubspace, GaussianPosterior])
def test_names_of_buffers_add_to_those_of_a_module(kind):
    average = kind(net(), buffer_names=frozenset({"0.bias"}))
    assert sorted(average.tracked.averaged) == ["0.weight", "1.bias", "1.weight"]


def test_names_of_extra_state_among_the_buffers_make_no_difference():
    source = {"w": torch.ones(1), "b": torch.ones(1), "_extra_state": torch.ones(1)}
    average = RunningMean(source, buffer_names=frozenset({"b", "_extra_state"}))
    assert average.tracked.averaged == ["w"]


def valley():
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, 1.0)
    average = LossValley(model)
    average.update(model)
    return average, model


def test_a_valley_is_not_blended():
    average, model = valley()
    with refused("a valley can't be blended: take its weights into a RunningMean"):
        average.blend(average, 0.5)
    assert average.count == average.calls == 1
    other = RunningMean(model)
    other.blend(average, 0.5)
    assert other.weights()["weight"].item() == 1.0


def test_a_blended_validated_mean_has_no_metric_and_no_lookahead():
    model = nn.Linear(1, 1)

    def at(value):
        nn.init.constant_(model.weight, value)
        return model

    average, other = ValidatedMean(at(0.0)), ExponentialMean(model)
    average.decide(model, live=0.5)
    other.update(at(4.0))
    average.lookahead(at(2.0))
    average.blend(other, 0.5)
    assert average.weights()["weight"].item() == 2.0
    assert average.metric is None
    with refused("average=None: give the metric of the average"):
        average.decide(model, live=0.5, lookahead=0.6)
    assert average.decide(at(8.0), live=0.5, lookahead=0.6, average=0.55) == "soft"
    assert average.weights()["weight"].item() == 4.0  # (2·2 + 8)/3: not the old lookahead, 1


class Shaky(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.norm = nn.Linear(2, 2), nn.BatchNorm1d(2)
        self.register_buffer("none", None)

    def forward(self, x):
        return self.norm(self.inner(x))


@pytest.mark.filterwarnings("ignore:.torch.jit.script:")
def test_a_scripted_model_has_its_own_weights_again():
    model = Shaky()
    scripted = torch.jit.script(model)
    average, x = RunningMean(scripted), torch.randn(4, 2)
    average.update(scripted)
    scripted.eval()
    before = scripted(x)
    with torch.no_grad():
        scripted.inner.weight.add_(1)
    after, own = scripted(x), scripted.inner.weight.detach().clone()
    with average.applied_to(scripted):
        assert torch.equal(scripted(x), before)
    assert torch.equal(scripted(x), after)
    with pytest.raises(KeyError, match="mine"), average.applied_to(scripted):
        raise KeyError("mine")
    assert torch.equal(scripted.inner.weight, own)
