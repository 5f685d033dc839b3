"""An average notices when a model's tensors were replaced or moved, and moves itself whole."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from trajectories import assert_same, small_net, snapshot, walk, wander

from dgavg.averaging import (
    ExponentialMean,
    LatestMean,
    LossValley,
    RunningMean,
    ValidatedMean,
    WeightSubspace,
    flatten_parameters,
)

ALL = [RunningMean, ExponentialMean, LatestMean]


def mean_after(change, model, source=lambda model: model):
    """The mean over four states, where `change(model)` happens between two, and the plain one."""
    average = RunningMean(source(model), buffers="average")
    seen = []
    for step in walk(model, 4):
        if step == 3:
            change(model)
            wander(model, 99)
        average.update(source(model))
        seen.append(snapshot(model))
    means = {k: torch.stack([s[k].double() for s in seen]).mean(dim=0) for k in seen[0]}
    return average, means


def replaced_storage(model):
    for p in model.parameters():
        p.data = p.data.clone()


def one_replaced_storage(model):
    model[1].bias.data = model[1].bias.data.clone()


def replaced_parameter(model):
    model[3].weight = nn.Parameter(model[3].weight.detach().clone())


def replaced_buffer(model):
    model[1].running_mean = model[1].running_mean + 0


def replaced_module(model):
    model[4] = copy.deepcopy(model[4])


def doubled(model):
    model.double()


def narrowed(model):
    model[3].half()


def channels_last(model):
    model.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("source", ["module", "mapping"])
@pytest.mark.parametrize(
    "change",
    [
        replaced_storage,
        one_replaced_storage,
        replaced_parameter,
        replaced_buffer,
        replaced_module,
        doubled,
        narrowed,
        channels_last,
        flatten_parameters,
    ],
)
def test_a_change_of_the_models_tensors_is_noticed(change, source):
    of = (lambda m: m) if source == "module" else (lambda m: m.state_dict())
    average, means = mean_after(change, small_net(), of)
    found = average.weights()
    for name, mean in means.items():
        if "num_batches" not in name:
            rtol = 1e-3 if found[name].dtype == torch.half else 1e-5
            torch.testing.assert_close(found[name].double(), mean, rtol=rtol, atol=rtol)


def test_one_mapping_whose_tensor_is_replaced_or_moved_is_followed():
    weights = {"a": torch.zeros(3), "b": torch.zeros(3)}
    average = RunningMean(weights)
    average.update(weights)
    weights["a"] = torch.full((3,), 2.0)
    average.update(weights)
    weights["b"].data = torch.full((3,), 3.0)
    average.update(weights)
    assert average.weights()["a"].tolist() == pytest.approx([4 / 3] * 3)
    assert average.weights()["b"].tolist() == pytest.approx([1.0] * 3)


def test_the_same_memory_under_other_names_or_shapes_is_refused():
    memory = torch.zeros(6)
    average = RunningMean({"a": memory.view(2, 3)})
    average.update({"a": memory.view(2, 3)})
    with pytest.raises(ValueError, match=r"1 names missing \(a\), 1 unknown \(b\)"):
        average.update({"b": memory.view(2, 3)})
    for view in (memory.view(3, 2), memory[:3].view(1, 3)):
        with pytest.raises(ValueError, match=r"a is \(\d, \d\), the average \(2, 3\)"):
            average.update({"a": view})


def test_a_narrower_source_does_not_narrow_what_was_kept():
    model = small_net()
    average = LatestMean(model, k=3)
    average.update(model)
    kept = average.weights()["0.weight"].clone()
    model.bfloat16()
    average.update(model)
    mean = (kept + model[0].weight.detach().float()) / 2
    assert average.weights()["0.weight"].equal(mean.bfloat16())
    assert average.state_dict()["tensors"]["latest/0.weight"][0].equal(kept)


def test_an_average_that_was_widened_stays_so():
    model = small_net()
    model[3].double()
    average = RunningMean(model)
    average.update(model)
    kept = average.state_dict()["tensors"]["3.weight"].clone()
    flatten_parameters(model.float())
    average.update(model)
    found = average.state_dict()["tensors"]
    assert found["3.weight"].dtype == torch.float64
    assert found["3.weight"].equal((kept + model[3].weight.double()) / 2)
    assert {found["3.bias"].dtype, found["4.weight"].dtype} == {torch.float64, torch.float32}


def test_an_update_that_ran_out_of_memory_can_be_repeated():
    class Starved(RunningMean):
        starved = False

        def _follow(self, live):
            if self.starved:
                self.starved = False
                raise MemoryError
            super()._follow(live)

    model, plain = small_net(), small_net()
    average, expected = Starved(model), RunningMean(plain)
    for step in walk(model, 4):
        wander(plain, step)
        if step == 3:
            model.double()
            plain.double()
            average.starved = True
            with pytest.raises(MemoryError):
                average.update(model)
        average.update(model)
        expected.update(plain)
    assert_same(average.state_dict()["tensors"], expected.state_dict()["tensors"], rtol=0)
    assert average.calls == 4


def add_parameter(model):
    model[1].extra = nn.Parameter(torch.zeros(2))


def add_buffer(model):
    model[2].register_buffer("extra", torch.zeros(2))


def add_module(model):
    model[2].extra = nn.Linear(2, 2)


def remove_module(model):
    del model[4]


def remove_last(model):
    del model[4].bias


def reshape(model):
    model[4].weight.data = torch.zeros(3, 71)


@pytest.mark.parametrize(
    "change", [add_parameter, add_buffer, add_module, remove_module, remove_last, reshape]
)
@pytest.mark.parametrize("kind", ALL)
def test_a_model_with_others_than_before_is_refused(change, kind):
    model = small_net()
    average = kind(model)
    average.update(model)
    change(model)
    with pytest.raises(ValueError, match="another model"):
        average.update(model)
    assert average.calls == average.count == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
def test_a_scripted_module_is_followed():
    model = torch.jit.script(nn.Linear(2, 2))
    average = RunningMean(model)
    for value in (1.0, 2.0):
        nn.init.constant_(model.weight, value)
        average.update(model)
    model.weight = nn.Parameter(torch.full((2, 2), 6.0))
    average.update(model)
    assert average.weights()["weight"].unique().tolist() == [3.0]


def copied(average):
    return copy.deepcopy(average)


def pickled(average):
    return pickle.loads(pickle.dumps(average))


def saved(average):
    file = io.BytesIO()
    torch.save(average, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [copied, pickled, saved])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("kind", ALL)
def test_a_copy_goes_on_by_itself(kind, way, flat):
    model = small_net()
    if flat:
        flatten_parameters(model)
    average = kind(model, buffers="average")
    for _ in walk(model, 3):
        average.update(model)
    twin, before = way(average), {k: v.clone() for k, v in average.weights().items()}
    assert_same(twin.weights(), before, rtol=0)
    wander(model, 8)
    twin.update(model)
    assert_same(average.weights(), before, rtol=0)  # no memory in common
    average.update(model)
    assert_same(twin.weights(), average.weights(), rtol=0)
    assert (twin.calls, twin.count) == (average.calls, average.count) == (4, 4)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("kind", [RunningMean, ExponentialMean])
def test_a_pickle_holds_the_average_once_and_the_model_not_at_all(kind, flat):
    model = nn.Sequential(*(nn.Linear(60, 60) for _ in range(10)))
    if flat:
        flatten_parameters(model)
    average = kind(model)
    average.update(model)
    average.update(model)
    size = sum(4 * p.numel() for p in model.parameters())
    assert len(pickle.dumps(average)) < 1.2 * size


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("kind", ALL)
def test_an_average_moves_with_the_model(kind, flat):
    model, twin = small_net(), small_net()
    if flat:
        flatten_parameters(twin)
    average, moving = kind(model), kind(twin)
    for step in walk(model, 6):
        if step in (2, 5):
            twin.to("cuda" if step == 2 else "cpu")
        twin.load_state_dict(model.state_dict())
        average.update(model)
        moving.update(twin)
        assert {t.device for t in moving.weights().values()} == {twin[0].weight.device}
    assert_same(moving.weights(), average.weights())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ALL)
def test_an_average_on_the_cpu_of_a_model_that_is_not(kind):
    model, twin = small_net(), small_net().cuda()
    average, far = kind(model), kind(twin, device="cpu")
    for _ in walk(model, 4):
        twin.load_state_dict(model.state_dict())
        average.update(model)
        far.update(twin)
    assert {t.device.type for t in far.weights().values()} == {"cpu"}
    assert_same(far.weights(), average.weights())
    with far.applied_to(twin):
        assert {p.device.type for p in twin.parameters()} == {"cuda"}
        assert_same({k: v.cpu() for k, v in snapshot(twin).items()}, average.weights())


def looks_ahead(average, model):
    average.lookahead(model)


def is_told(average, model):
    average.evaluated(model, 1.0)


def writes(average, model):
    average.copy_to(model)


LOOKS = [
    (WeightSubspace, writes),
    (RunningMean, writes),
    (ValidatedMean, looks_ahead),
    (LossValley, is_told),
]


@pytest.mark.parametrize(("kind", "look"), LOOKS)
def test_what_takes_no_weights_in_moves_no_average(kind, look):
    """A copy of the model, in more bits here, may be written to or be the one that is scored."""
    model = small_net()
    average = kind(model)
    for _ in walk(model, 3):
        average.update(model)
    before = {t.dtype for t in average.state_dict()["tensors"].values()}
    seen = average.tracked._live
    look(average, copy.deepcopy(model).double())
    assert {t.dtype for t in average.state_dict()["tensors"].values()} == before
    assert {t.dtype for t in average.weights().values()} == {torch.float32, torch.int64}
    assert average.tracked._live is seen
