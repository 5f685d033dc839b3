"""copy_parameters and average_parameters against NumPy float64, parameter by parameter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from dgavg.averaging.snapshots import average_parameters, copy_parameters


def model_of(dtype=torch.float32):
    """A buffer, a frozen parameter and one without dimensions among the parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).to(dtype)
    model.scale = nn.Parameter(torch.tensor(2.0, dtype=dtype))
    model[2].bias.requires_grad_(False)
    return model


def tied_model():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    return model


class Kinds(nn.Module):
    """Parameters that are not real numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.Parameter(torch.arange(3), requires_grad=False)
        self.mask = nn.Parameter(torch.tensor([True, False]), requires_grad=False)
        self.phase = nn.Parameter(torch.tensor([1 + 2j, 3 - 1j]))


@torch.no_grad()
def walk(model, generator):
    """One random step of every parameter."""
    for p in model.parameters():
        if p.is_floating_point() or p.is_complex():
            p.add_(torch.randn(p.shape, dtype=p.dtype, generator=generator))
        else:
            p.copy_(torch.randint(0, 2, p.shape, generator=generator))


def array(tensor):
    return (
        tensor.detach()
        .to(torch.complex128 if tensor.is_complex() else torch.float64)
        .numpy()
        .copy()
    )


def unchanged(tensors, before):
    return tensors.keys() == before.keys() and all(
        v.dtype == before[k].dtype and torch.equal(v, before[k]) for k, v in tensors.items()
    )


def clones(tensors):
    return {k: v.detach().clone() for k, v in tensors.items()}


def test_a_copy_holds_the_parameters_alone_and_stays_when_they_move():
    model = model_of()
    copy = copy_parameters(model)
    assert unchanged(copy, dict(model.named_parameters()))
    assert not any(v.requires_grad for v in copy.values())
    before = clones(copy)
    walk(model, torch.Generator().manual_seed(0))
    assert unchanged(copy, before)
    assert not torch.equal(copy["0.weight"], model[0].weight)


def test_a_copy_goes_back_bit_for_bit_in_place():
    model = model_of(torch.bfloat16)
    copy, pointers = copy_parameters(model), [p.data_ptr() for p in model.parameters()]
    walk(model, torch.Generator().manual_seed(0))
    found = copy_parameters(model, copy)
    assert unchanged(dict(model.named_parameters()), copy)
    assert found == dict.fromkeys(copy, True)
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert all(p.grad_fn is None and p.is_leaf for p in model.parameters())


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, 0.0),
        (0.1, 0.1),
        (True, 1.0),
        (torch.tensor(3.5), 3.5),
        (torch.tensor(4), 4.0),
        (np.float32(0.5), 0.5),
    ],
)
def test_one_number_fills_a_parameter(value, expected):
    model = model_of(torch.float64)
    assert copy_parameters(model, {"0.weight": value, "scale": value})["0.weight"]
    assert torch.equal(model[0].weight, torch.full((4, 3), expected, dtype=torch.float64))
    assert model.scale.item() == expected


def test_a_number_keeps_its_digits():
    model = Kinds()
    model.phase = nn.Parameter(model.phase.to(torch.complex128))
    copy_parameters(model, {"phase": 0.1 + 0.3j, "steps": 2**53 + 1})
    assert model.phase.tolist() == [0.1 + 0.3j] * 2
    assert model.steps.tolist() == [2**53 + 1] * 3


def test_a_value_of_another_dtype_is_converted():
    model = model_of(torch.bfloat16)
    value = torch.full((4,), 1 / 3, dtype=torch.float64)
    copy_parameters(model, {"0.bias": value})
    assert model[0].bias.dtype == torch.bfloat16
    assert torch.equal(model[0].bias, value.bfloat16())


REFUSED = {
    "a row that broadcasts": (torch.zeros(3), r"the parameter is \(4, 3\), the value \(3,\); give"),
    "one element in a list": (torch.zeros(1), r"the parameter is \(4, 3\), the value \(1,\); give"),
    "more elements": (torch.zeros(4, 4), r"the parameter is \(4, 3\), the value \(4, 4\)"),
    "a leading one": (torch.zeros(1, 4, 3), r"the parameter is \(4, 3\), the value \(1, 4, 3\)"),
    "complex": (
        torch.zeros(4, 3, dtype=torch.complex64),
        r"the parameter is torch.float32, the val",
    ),
    "a complex number": (1j, r"the parameter is torch.float32, the value torch.complex128"),
    "a list": ([1.0], r"a list is neither a tensor nor a number"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_value_that_does_not_fit_is_refused_before_anything_is_written(kind):
    model = model_of()
    before = clones(dict(model.named_parameters()))
    value, message = REFUSED[kind]
    with pytest.raises(ValueError, match=rf"^0\.weight: {message}"):
        copy_parameters(model, {"2.weight": 5.0, "0.weight": value, "2.bias": 1.0})
    assert unchanged(dict(model.named_parameters()), before)


def test_a_parameter_without_dimensions_takes_no_list_of_one():
    with pytest.raises(ValueError, match=r"^scale: the parameter is \(\), the value \(1,\)"):
        copy_parameters(model_of(), {"scale": torch.zeros(1)})


def test_a_fraction_does_not_go_into_integers():
    with pytest.raises(ValueError, match=r"^steps: the parameter is torch.int64, the val"):
        copy_parameters(Kinds(), {"steps": 0.5})


def test_names_that_either_side_lacks_are_reported():
    model = model_of()
    bias = model[0].bias.detach().clone()
    found = copy_parameters(model, {"0.weight": 1.0, "0.wieght": 2.0, "1.running_mean": 0.0})
    lacking = {"0.bias", "1.weight", "1.bias", "2.weight", "2.bias", "scale"}
    assert found == {
        "0.weight": True,
        "0.wieght": False,
        "1.running_mean": False,  # a buffer
        **dict.fromkeys(lacking, False),
    }
    assert torch.equal(model[0].bias, bias)


def test_a_tied_parameter_is_copied_once_and_found_by_any_name():
    model = tied_model()
    assert list(copy_parameters(model)) == ["0.weight"]
    assert copy_parameters(model, {"1.weight": 3.0}) == {"0.weight": True, "1.weight": True}
    assert torch.equal(model[0].weight, torch.full((3, 3), 3.0))
    assert copy_parameters(model, {"1.weight": 4.0, "0.weight": 5.0})["0.weight"]
    assert model[1].weight.unique().item() == 5.0
    assert copy_parameters(model, {}) == {"0.weight": False}


def test_prefixes_of_wrapped_models_are_no_part_of_the_names():
    model = model_of()
    wrapped = nn.DataParallel(torch.compile(model, backend="eager"))
    copy = copy_parameters(wrapped)
    assert copy.keys() == dict(model.named_parameters()).keys()
    walk(model, torch.Generator().manual_seed(0))
    prefixed = {f"module._orig_mod.{k}": v for k, v in copy.items()}
    assert all(copy_parameters(model, prefixed).values())
    assert unchanged(dict(model.named_parameters()), copy)
    walk(model, torch.Generator().manual_seed(1))
    assert all(copy_parameters(wrapped, copy).values())
    average_parameters(wrapped, copy)


def test_parametrized_weights_go_by_their_parts():
    model = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    copy = copy_parameters(model)
    expected = model.weight.detach().clone()
    walk(model, torch.Generator().manual_seed(0))
    assert all(copy_parameters(model, copy).values())
    torch.testing.assert_close(model.weight, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_average_is_the_mean_of_all_models(dtype):
    model, generator = model_of(dtype), torch.Generator().manual_seed(1)
    averages = copy_parameters(model)
    history = [clones(dict(model.named_parameters()))]
    for _ in range(50):
        walk(model, generator)
        average_parameters(model, averages)
        history.append(clones(dict(model.named_parameters())))
    assert averages.pop(".n").item() == 51
    assert averages.keys() == history[0].keys()
    for name, mean in averages.items():
        assert mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        expected = np.mean([array(model[name]) for model in history], axis=0)
        tolerance = 1e-13 if dtype == torch.float64 else 2e-6
        np.testing.assert_allclose(mean.numpy(), expected, rtol=tolerance, atol=tolerance * 8)


def test_a_slow_bfloat16_average_does_not_stand_still():
    model = nn.Linear(1, 1, bias=False).bfloat16()
    averages = copy_parameters(model) | {".n": torch.tensor(9999.0)}
    copy_parameters(model, {"weight": 1.0})
    first = averages["weight"].double().item()
    average_parameters(model, averages)
    assert averages["weight"].item() == pytest.approx(first + (1 - first) / 10000, rel=1e-6)


def test_the_average_is_updated_in_place():
    model = model_of()
    averages = copy_parameters(model)
    pointers = {k: v.data_ptr() for k, v in averages.items()}
    walk(model, torch.Generator().manual_seed(1))
    average_parameters(model, averages)
    assert {k: averages[k].data_ptr() for k in pointers} == pointers


def test_the_count_is_a_float64_number_that_starts_at_one():
    model = model_of()
    averages = copy_parameters(model)
    average_parameters(model, averages)
    count = averages[".n"]
    assert (count.dtype, count.shape, count.item()) == (torch.float64, (), 2.0)


@pytest.mark.parametrize("n", [0, 1, 3, 2.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_the_average_goes_on_from_any_count(n, dtype):
    model = model_of(torch.float64)
    averages, old = copy_parameters(model), array(model[0].weight)
    averages[".n"] = torch.tensor(n, dtype=dtype)
    n = averages[".n"].item()
    walk(model, torch.Generator().manual_seed(1))
    average_parameters(model, averages)
    expected = old + (array(model[0].weight) - old) / (1 + n)
    np.testing.assert_allclose(averages["0.weight"].numpy(), expected, rtol=1e-12)
    assert averages[".n"].item() == n + 1


def test_complex_parameters_are_averaged_and_integers_copied():
    model, generator = Kinds(), torch.Generator().manual_seed(2)
    averages, phases = copy_parameters(model), [array(model.phase)]
    for _ in range(5):
        walk(model, generator)
        average_parameters(model, averages)
        phases.append(array(model.phase))
    np.testing.assert_allclose(averages["phase"].numpy(), np.mean(phases, axis=0), rtol=1e-5)
    assert averages["phase"].dtype == torch.complex64
    assert torch.equal(averages["steps"], model.steps)
    assert averages["steps"].dtype == torch.int64
    assert torch.equal(averages["mask"], model.mask)


def test_a_tied_parameter_is_averaged_once():
    model = tied_model()
    averages, old = copy_parameters(model), array(model[0].weight)
    copy_parameters(model, {"0.weight": 1.0})
    average_parameters(model, averages)
    np.testing.assert_allclose(averages["0.weight"].numpy(), (old + 1.0) / 2, rtol=1e-6)


def test_the_average_goes_into_the_model():
    model = model_of(torch.bfloat16)
    averages = copy_parameters(model)
    walk(model, torch.Generator().manual_seed(1))
    average_parameters(model, averages)
    found = copy_parameters(model, averages)
    assert found == dict.fromkeys(dict(model.named_parameters()), True)  # the count is no name
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, averages[name].bfloat16())


def set_entry(name, value):
    return lambda model, averages: averages.update({name: value})


WRONG = {
    "a missing parameter": (
        lambda model, averages: averages.pop("2.weight"),
        r"^2\.weight is not in the averages: start with copy_parameters\(model\)$",
    ),
    "another shape": (
        set_entry("2.weight", torch.zeros(4, 2)),
        r"^2\.weight: the parameter is \(2, 4\), the average \(4, 2\)$",
    ),
    "a shape that broadcasts": (
        set_entry("2.weight", torch.zeros(1, 4)),
        r"^2\.weight: the parameter is \(2, 4\), the average \(1, 4\)$",
    ),
    "a name too many": (set_entry("2.wieght", torch.zeros(1)), r"^2\.wieght is no parameter of"),
    "the live memory": (
        lambda model, averages: averages.update(model.named_parameters()),
        r"^scale: the average is the model's own memory: start with copy_parameters\(model\)$",
    ),
    "a negative count": (set_entry(".n", torch.tensor(-1.0)), r"^\.n is -1\.0: how many models"),
    "no number": (set_entry(".n", torch.tensor(np.nan)), r"^\.n is nan: how many models, one"),
    "an endless count": (set_entry(".n", torch.tensor(np.inf)), r"^\.n is inf: how many models"),
    "two counts": (set_entry(".n", torch.ones(2)), r"^\.n is \[1\.0, 1\.0\]: how many models, one"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_averages_that_do_not_fit_are_refused_before_anything_is_changed(kind):
    model = model_of()
    averages = copy_parameters(model)
    spoil, message = WRONG[kind]
    spoil(model, averages)
    walk(model, torch.Generator().manual_seed(1))
    before = clones(averages)
    with pytest.raises(ValueError, match=message):
        average_parameters(model, averages)
    assert averages.keys() == before.keys()
    for name, tensor in averages.items():
        assert tensor.equal(before[name]) or bool(tensor.isnan().any())


def test_a_model_without_shapes_is_refused():
    with pytest.raises(ValueError, match=r"^weight has no shape yet: run one batch through"):
        copy_parameters(nn.LazyLinear(3))


def test_a_second_name_in_the_averages_is_refused():
    model = tied_model()
    averages = clones(model.state_dict())
    with pytest.raises(ValueError, match=r"^1\.weight is no parameter of the model, or its second"):
        average_parameters(model, averages)


def test_an_average_is_never_narrower_than_the_model():
    model = model_of(torch.float64)
    averages = {k: v.float() for k, v in copy_parameters(model).items()}
    old = averages["0.weight"].double().numpy()
    walk(model, torch.Generator().manual_seed(1))
    average_parameters(model, averages)
    expected = (old + array(model[0].weight)) / 2
    np.testing.assert_allclose(averages["0.weight"].numpy(), expected, rtol=1e-13)
