"""What averages elsewhere get wrong: which tensors, which numbers, which steps."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, weight_norm
from trajectories import assert_same, small_net, snapshot, walk

from dgavg.averaging import ExponentialMean, LatestMean, RunningMean, named_tensors

ALL = [RunningMean, ExponentialMean, LatestMean]


def updated(average, model, updates=3):
    for _ in walk(model, updates):
        average.update(model)
    return average.weights()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(3, 2), nn.Linear(2, 3, bias=False)
        self.out.weight = self.embed.weight


@pytest.mark.parametrize("mapping", [False, True])
def test_tied_weights_move_once(mapping):
    """Twice a step at decay 0.9 gives 0.19."""
    model = Tied()
    source = model.state_dict() if mapping else model
    average = ExponentialMean(source, decay=0.9)
    for value in (0.0, 1.0):
        nn.init.constant_(model.out.weight, value)
        average.update(source)
    assert average.weights()["out.weight"].unique().tolist() == pytest.approx([0.1])
    assert average.weights()["embed.weight"].unique().tolist() == pytest.approx([0.1])


def test_weights_that_are_no_longer_tied_are_refused():
    model = Tied()
    average = RunningMean(model)
    average.update(model)
    model.out.weight = nn.Parameter(model.embed.weight.detach() + 1)
    with pytest.raises(ValueError, match=r"embed\.weight and out\.weight were tied but now differ"):
        average.update(model)


def test_equal_copies_of_tied_weights_will_do():
    model = Tied()
    average = RunningMean(model)
    average.update({k: v.clone() for k, v in model.state_dict().items()})
    assert average.weights()["out.weight"].equal(model.out.weight)


class Norms(nn.Module):
    """Buffers of every kind."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2, momentum=None)
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("hidden", torch.zeros(2), persistent=False)
        self.register_buffer("places", torch.arange(3), persistent=False)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_counters_and_masks_are_those_of_the_newest(kind, buffers):
    """A batch norm without momentum divides by its counter: 50 batches are 50."""
    model = Norms()
    average = kind(model, buffers=buffers)
    for _ in range(5):
        for _ in range(10):
            model.norm(torch.randn(4, 2))
        model.mask.logical_not_()
        average.update(model)
    assert average.weights()["norm.num_batches_tracked"].item() == 50
    assert average.weights()["mask"].tolist() == [False, True]
    assert average.weights()["mask"].dtype == torch.bool


@pytest.mark.parametrize("kind", ALL)
def test_buffers_that_are_not_saved_are_followed_all_the_same(kind):
    model = Norms()
    average = kind(model)
    model.hidden.fill_(3.0)
    model.places.add_(1)
    average.update(model)
    assert list(average.weights()) == list(model.state_dict())
    model.hidden.fill_(9.0)
    model.places.add_(1)
    with average.applied_to(model):
        assert model.hidden.tolist() == [3.0, 3.0]
        assert model.places.tolist() == [1, 2, 3]
    assert model.hidden.tolist() == [9.0, 9.0]


@pytest.mark.parametrize("kind", ALL)
def test_complex_weights_are_averaged_and_complex_buffers_copied(kind):
    model = nn.Linear(2, 2, dtype=torch.complex64)
    model.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
    model.register_buffer("twist", torch.zeros(70, dtype=torch.complex128))
    average = kind(model)
    seen = []
    for value in (1.0 + 1.0j, 3.0 - 1.0j):
        nn.init.constant_(model.weight, value)
        model.phase.fill_(value)
        model.twist.fill_(value)
        average.update(model)
        seen.append(value)
    share = 0.001 if kind is ExponentialMean else 0.5
    expected = (1 - share) * seen[0] + share * seen[1]
    torch.testing.assert_close(average.weights()["weight"], torch.full((2, 2), expected))
    assert average.weights()["phase"].tolist() == [seen[1]] * 2
    assert average.weights()["twist"].tolist() == [seen[1]] * 70


@pytest.mark.parametrize("kind", ALL)
def test_lazy_parameters_are_an_error_that_says_what_to_do(kind):
    with pytest.raises(ValueError, match="weight has no shape yet: run one batch before"):
        kind(nn.LazyLinear(2))


def test_parameters_without_values_are_an_error():
    with pytest.raises(ValueError, match="weight has no values yet: move the model off the meta"):
        RunningMean(nn.Linear(2, 2, device="meta"))


def test_sparse_tensors_are_an_error():
    with pytest.raises(ValueError, match="w is sparse"):
        RunningMean({"w": torch.eye(2).to_sparse()})


def test_parametrized_weights_are_averaged_as_they_are_trained():
    model = parametrizations.weight_norm(nn.Linear(3, 2))
    weights = updated(RunningMean(model), model)
    assert {k for k in weights if "original" in k} == {
        "parametrizations.weight.original0",
        "parametrizations.weight.original1",
    }
    twin = parametrizations.weight_norm(nn.Linear(3, 2))
    twin.load_state_dict(weights)


def old_weight_norm():
    with pytest.warns(FutureWarning, match="weight_norm"):
        return weight_norm(nn.Linear(3, 2))


def test_old_weight_norm_is_averaged_and_applied():
    """Its weight is computed, no leaf: modules that have one can't be copied deeply."""
    model = old_weight_norm()
    x = torch.randn(4, 3)
    model(x)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    average = RunningMean(model)
    weights = copy.deepcopy(updated(average, model))
    assert set(weights) == {"bias", "weight_g", "weight_v"}
    live = model(x)
    with average.applied_to(model):
        v, g = weights["weight_v"], weights["weight_g"]
        expected = x @ (g * v / v.norm(dim=1, keepdim=True)).T + weights["bias"]
        torch.testing.assert_close(model(x), expected)
    assert model(x).equal(live)


def test_members_that_cannot_be_copied_are_left_alone():
    model = small_net()
    model.lock = threading.Lock()
    model.register_forward_hook(lambda *_: None)
    average = RunningMean(model)
    updated(average, model)
    pickle.loads(pickle.dumps(average))
    with average.applied_to(model):
        pass


class Wrapped(nn.Module):
    """What DataParallel and DistributedDataParallel do to names."""

    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize("wrap", [torch.compile, Wrapped, lambda m: Wrapped(torch.compile(m))])
def test_wrapped_models_are_followed_and_not_skipped(wrap):
    model = small_net()
    average = RunningMean(model)
    assert_same(updated(average, wrap(model), updates=1), snapshot(model))


def test_a_compiled_model_sees_the_averaged_weights():
    model = torch.compile(nn.Linear(2, 1, bias=False), backend="eager")
    average = ExponentialMean(model, decay=0.5)
    for value in (1.0, 2.0):
        nn.init.constant_(model.weight, value)
        average.update(model)
    x = torch.ones(1, 2)
    assert model(x).item() == 4.0
    with average.applied_to(model):
        assert model(x).item() == 3.0
    assert model(x).item() == 4.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay", [0.99, 0.999, 0.9999])
def test_low_precision_averages_move(dtype, decay):
    """In bfloat16 itself 0.898 stays where it is for ever."""
    model = {"w": torch.full((3,), 0.9, dtype=dtype)}
    average = ExponentialMean(model, decay=decay)
    average.update(model)
    start = model["w"].float()
    model["w"] = torch.ones(3, dtype=dtype)
    for _ in range(1000):
        average.update(model)
    found = average.state_dict()["tensors"]["w"]
    torch.testing.assert_close(found, 1 - (1 - start) * decay**1000, rtol=1e-4, atol=0)
    assert average.weights()["w"].dtype == dtype


def test_an_average_copies_and_never_aliases():
    """Means of 1, 2, 3 that are 3 are three times the same memory."""
    for kind in ALL:
        model = {"w": torch.ones(1), "n": torch.ones(1, dtype=torch.int64)}
        average = kind(model, **({"decay": 0.5} if kind is ExponentialMean else {}))
        for value in (1.0, 2.0, 3.0):
            model["w"].fill_(value)
            model["n"].fill_(int(value))
            average.update(model)
        expected = 2.25 if kind is ExponentialMean else 2.0
        assert average.weights()["w"].item() == expected
        model["n"].fill_(9)
        assert average.weights()["n"].item() == 3


@pytest.mark.parametrize("mapping", [False, True])
def test_a_mask_has_no_mean_even_where_buffers_are_averaged(mapping):
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    source = model.state_dict() if mapping else model
    average = RunningMean(source, buffers="average")
    for _ in range(3):
        average.update(source)
    assert average.weights()["mask"].tolist() == [0.0, -torch.inf]


def test_a_weight_that_starts_infinite_is_no_mask():
    model = nn.Linear(2, 1)
    nn.init.constant_(model.bias, torch.inf)
    average = RunningMean(model)
    for value in (1.0, 2.0):
        nn.init.constant_(model.bias, value)
        average.update(model)
    assert average.weights()["bias"].item() == 1.5


def test_buffers_follow_a_model_into_another_dtype():
    model = small_net()
    average = RunningMean(model)
    average.update(model)
    model.double()
    updated(average, model, updates=1)
    assert average.weights()["1.running_mean"].equal(model[1].running_mean)
    assert {t.dtype for t in average.weights().values()} == {torch.float64, torch.int64}


def test_names_are_those_of_the_state_dict():
    model = small_net()
    average = RunningMean(model)
    updated(average, model)
    assert list(average.weights()) == list(model.state_dict()) == list(named_tensors(model))
    copy.deepcopy(model).load_state_dict(average.weights())


@pytest.mark.parametrize("kind", ALL)
def test_inference_mode_makes_no_difference(kind):
    """Tensors made in it can't be changed outside; an average has none."""
    model = small_net()
    plain = kind(model)
    with torch.inference_mode():
        average = kind(model)
    for step in walk(model, 4):
        plain.update(model)
        with torch.inference_mode(step % 2 == 1):
            average.update(model)
            with average.applied_to(model):
                model.eval()(torch.zeros(1, 2, 5, 5))
    assert_same(average.weights(), plain.weights(), rtol=0)
    model(torch.zeros(1, 2, 5, 5)).sum().backward()
