"""WeightAverage: which tensors it holds, in which dtype, under which name, and its life cycle."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dgavg.averaging import ExponentialMean, RunningMean


class Zoo(nn.Module):
    """One tensor of every kind: tied, complex, integer, boolean, batch norm, empty."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.phase = nn.Parameter(torch.randn(4, dtype=torch.complex64))
        self.none = nn.Parameter(torch.zeros(0))
        self.register_buffer("nobody", torch.zeros(0, dtype=torch.int64))
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("seen", torch.tensor(7))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("spin", torch.randn(2, dtype=torch.complex64))


@torch.no_grad()
def shake(model, seed):
    """New values for everything, in place."""
    random = torch.Generator().manual_seed(seed)
    for tensor in {id(t): t for t in model.state_dict().values()}.values():
        tensor.copy_(torch.randn(tensor.shape, generator=random) * 10)
    return {k: v.clone() for k, v in model.state_dict().items()}


def averaged_over(model, average, updates=5):
    snapshots = []
    for seed in range(updates):
        snapshots.append(shake(model, seed))
        average.update(model)
    return snapshots


def test_every_kind_of_float_is_averaged_and_the_rest_is_copied():
    model = Zoo()
    average = RunningMean(model, buffers="average")
    snapshots = averaged_over(model, average)
    for name, found in average.weights().items():
        stack = torch.stack([s[name] for s in snapshots])
        if stack.is_floating_point() or stack.is_complex():
            wide = torch.complex128 if stack.is_complex() else torch.float64
            expected = stack.to(wide).mean(dim=0).to(found.dtype)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        else:
            assert found.equal(snapshots[-1][name]), name
        assert found.dtype == snapshots[0][name].dtype


def test_tied_parameters_are_averaged_once_and_stay_tied():
    model = Zoo()
    average = ExponentialMean(model, decay=0.9)
    for value in (0.0, 1.0):
        with torch.no_grad():
            model.first.weight.fill_(value)
        average.update(model)
    weights = average.weights()
    assert weights["first.weight"].flatten()[0].item() == pytest.approx(0.1)  # twice gives 0.19
    assert weights["first.weight"].data_ptr() == weights["second.weight"].data_ptr()
    assert len(average.state_dict()["tensors"]) == len(weights) - 1


def test_copied_buffers_are_the_newest_and_averaged_parameters_are_not():
    model = Zoo()
    average = RunningMean(model, buffers="copy")
    newest = averaged_over(model, average)[-1]
    weights = average.weights()
    for name, _ in model.named_buffers():
        assert weights[name].equal(newest[name]), name
    assert not weights["second.weight"].equal(newest["second.weight"])
    assert not weights["norm.weight"].equal(newest["norm.weight"])


def test_buffers_of_a_mapping_are_told_by_name():
    model = Zoo()
    average = RunningMean(
        model.state_dict(), buffers="copy", buffer_names=frozenset({"norm.running_mean"})
    )
    newest = averaged_over(model, average)[-1]
    weights = average.weights()
    assert weights["norm.running_mean"].equal(newest["norm.running_mean"])
    assert not weights["norm.running_var"].equal(newest["norm.running_var"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_are_averaged_in_float32(dtype):
    """In bfloat16 itself 0.9 + 0.001·0.1 is 0.9 again and the average stands still."""
    model = nn.Linear(1, 1, bias=False, dtype=dtype)
    average = ExponentialMean(model, decay=0.999)
    nn.init.constant_(model.weight, 0.5)
    average.update(model)
    nn.init.constant_(model.weight, 1.0)
    for _ in range(2000):
        average.update(model)
    assert average.state_dict()["tensors"]["weight"].dtype == torch.float32
    assert average.weights()["weight"].dtype == dtype
    exact = 1 - 0.5 * 0.999**2000
    assert average.state_dict()["tensors"]["weight"].item() == pytest.approx(exact, abs=1e-5)


def test_float64_stays_float64():
    model = nn.Linear(2, 2).double()
    average = RunningMean(model)
    first, second = shake(model, 0), None
    average.update(model)
    second = shake(model, 1)
    average.update(model)
    assert torch.equal(average.weights()["weight"], (first["weight"] + second["weight"]) / 2)


def test_a_source_in_another_precision_is_taken_in():
    """A float32 average may follow weights that are bfloat16, and the other way round."""
    wide = nn.Linear(2, 2)
    average = RunningMean(wide)
    average.update(wide)
    narrow = copy.deepcopy(wide).bfloat16()
    average.update(narrow)
    expected = (wide.weight.detach() + narrow.weight.detach().float()) / 2
    torch.testing.assert_close(average.state_dict()["tensors"]["weight"], expected)
    assert average.weights()["weight"].dtype == torch.bfloat16  # that of the newest
    average.update(wide.double())
    assert average.weights()["weight"].dtype == torch.float64


def test_the_average_shares_no_memory_with_the_model():
    model = Zoo()
    average = RunningMean(model, buffers="copy")
    average.update(model)
    live = {t.data_ptr() for t in model.state_dict().values() if t.numel()}
    assert not live & {t.data_ptr() for t in average.weights().values() if t.numel()}


def test_the_first_update_copies_whatever_the_rate():
    model = Zoo()
    average = ExponentialMean(model, decay=0.999)
    snapshot = shake(model, 3)
    average.update(model)
    for name, tensor in average.weights().items():
        assert tensor.equal(snapshot[name]), name


class Wrapper(nn.Module):
    """What DataParallel does to names."""

    def __init__(self, module) -> None:
        super().__init__()
        self.module = module


def test_prefixes_of_wrapped_and_compiled_models_make_no_difference():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = RunningMean(model)
    partly = nn.Sequential(torch.compile(model[0]), model[1])
    sources = [model, torch.compile(model), Wrapper(model), Wrapper(torch.compile(model)), partly]
    assert "0._orig_mod.weight" in partly.state_dict()
    snapshots = []
    for seed, source in enumerate(sources):
        snapshots.append(shake(model, seed)["0.weight"])
        average.update(source)
    assert list(average.weights()) == list(model.state_dict())
    expected = torch.stack(snapshots).double().mean(dim=0).float()
    torch.testing.assert_close(average.weights()["0.weight"], expected)


def test_buffers_of_a_compiled_model_are_told_by_their_own_names():
    model = torch.compile(nn.BatchNorm1d(2))
    names = frozenset(k for k, _ in model.named_buffers())
    assert names
    average = RunningMean(model.state_dict(), buffers="copy", buffer_names=names)
    newest = averaged_over(model, average)[-1]
    assert average.weights()["running_mean"].equal(newest["_orig_mod.running_mean"])


def test_names_that_differ_in_a_prefix_alone_are_refused():
    tensors = {"weight": torch.zeros(1), "_orig_mod.weight": torch.ones(1)}
    with pytest.raises(ValueError, match="two tensors have the same name"):
        RunningMean(tensors)


@pytest.mark.parametrize("call", ["update", "copy_to"])
def test_another_model_is_refused_by_its_first_differences(call):
    average = RunningMean(nn.Linear(2, 2))
    average.update(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"1 names missing \(bias\), 0 unknown \(none\)"):
        getattr(average, call)(nn.Linear(2, 2, bias=False))
    with pytest.raises(
        ValueError, match=r"2 names missing \(weight, bias\), 2 unknown \(0\.weight"
    ):
        getattr(average, call)(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"weight is \(2, 3\), the average \(2, 2\)"):
        getattr(average, call)(nn.Linear(3, 2))


def test_a_model_with_more_names_is_refused():
    average = RunningMean(nn.Linear(2, 2, bias=False))
    with pytest.raises(ValueError, match=r"0 names missing \(none\), 1 unknown \(bias\)"):
        average.update(nn.Linear(2, 2))


def test_a_module_whose_parameter_was_replaced_is_followed():
    model = nn.Linear(2, 2)
    average = ExponentialMean(model, decay=0.0)
    average.update(model)
    model.weight = nn.Parameter(torch.full((2, 2), 7.0))
    average.update(model)
    assert average.weights()["weight"].tolist() == [[7.0, 7.0], [7.0, 7.0]]


def test_a_copied_tensor_of_another_shape_is_refused():
    average = RunningMean({"w": torch.zeros(2), "steps": torch.zeros(2, dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"steps is \(1,\), the average \(2,\)"):
        average.update({"w": torch.zeros(2), "steps": torch.zeros(1, dtype=torch.int64)})


def test_before_the_first_update_there_is_nothing_to_give():
    model = nn.Linear(2, 2)
    average = RunningMean(model)
    with pytest.raises(ValueError, match="no weights have been averaged yet"):
        average.weights()
    with pytest.raises(ValueError, match="no weights have been averaged yet"):
        average.copy_to(model)


def test_an_unknown_way_with_buffers_is_refused():
    with pytest.raises(ValueError, match="buffers='drop': choose average or copy"):
        RunningMean(nn.Linear(1, 1), buffers="drop")


def test_writing_back_is_in_place_and_whole():
    model = Zoo()
    average = RunningMean(model, buffers="average")
    averaged_over(model, average)
    shake(model, 99)
    places = {k: v.data_ptr() for k, v in model.state_dict().items()}
    average.copy_to(model)
    assert {k: v.data_ptr() for k, v in model.state_dict().items()} == places
    for name, tensor in average.weights().items():
        assert model.state_dict()[name].equal(tensor), name


def test_a_model_of_integers_alone_is_copied():
    tensors = {"steps": torch.tensor(1)}
    average = RunningMean(tensors)
    for _ in range(2):
        tensors["steps"] += 1
        average.update(tensors)
    average.copy_to(tensors)
    assert average.weights()["steps"].item() == 3


@pytest.mark.parametrize("kind", [RunningMean, ExponentialMean])
def test_an_average_goes_on_from_its_saved_state_to_the_bit(kind):
    model = Zoo()
    straight = kind(model)
    for seed in range(3):
        shake(model, seed)
        straight.update(model)
    saved = copy.deepcopy(straight.state_dict())
    resumed = kind(Zoo())
    resumed.load_state_dict(saved)
    assert resumed.count == 3
    for seed in range(3, 6):
        shake(model, seed)
        straight.update(model)
        resumed.update(model)
    for name, tensor in straight.weights().items():
        assert tensor.equal(resumed.weights()[name]), name


def test_the_state_of_another_model_is_refused():
    average = RunningMean(nn.Linear(2, 2))
    average.update(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"1 names missing \(bias\)"):
        average.load_state_dict(RunningMean(nn.Linear(2, 2, bias=False)).state_dict())
    with pytest.raises(ValueError, match=r"weight is \(1, 2\)"):  # which would broadcast
        average.load_state_dict(RunningMean(nn.Linear(2, 1)).state_dict())


def test_a_mask_of_infinities_is_copied_since_it_has_no_mean():
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    average = ExponentialMean(model, decay=0.5)
    for _ in range(3):
        average.update(model)
    assert average.weights()["mask"].tolist() == [0.0, -torch.inf]
    average.copy_to(model)
    assert model.mask.tolist() == [0.0, -torch.inf]


def test_a_mapping_whose_tensors_are_replaced_is_followed():
    """As in a functional training loop."""
    weights = {"w": torch.zeros(1)}
    average = RunningMean(weights)
    for value in (1.0, 2.0, 3.0, 4.0):
        weights["w"] = torch.full((1,), value)
        average.update(weights)
    assert average.weights()["w"].item() == 2.5


def test_copied_buffers_of_a_mapping_must_be_named():
    with pytest.raises(ValueError, match="name its buffers in buffer_names"):
        RunningMean(nn.BatchNorm1d(2).state_dict(), buffers="copy")
