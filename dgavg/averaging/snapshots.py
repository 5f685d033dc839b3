"""Copies of a model's parameters in a plain dictionary, written back and averaged by name."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Number
from typing import overload

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dgavg.averaging.parameters import common, names_of, plain_name, real, wide

COUNT = ".n"  # no parameter's name begins with a dot

Value = Tensor | complex  # a tensor of the parameter's shape, or one number that fills it


@overload
def copy_parameters(model: nn.Module) -> dict[str, Tensor]: ...
@overload
def copy_parameters(model: nn.Module, values: Mapping[str, Value]) -> dict[str, bool]: ...
@torch.no_grad()
def copy_parameters(
    model: nn.Module, values: Mapping[str, Value] | None = None
) -> dict[str, Tensor] | dict[str, bool]:
    """Take a copy of the parameters of `model`, or write `values` into them, in place.

    Without `values`: detached clones by name, no buffers; a tied parameter once, under its first
    name. Names here are without the prefixes of compiled and distributed models.

    With `values`: each fills the parameter of its name, a number or tensor of no dimensions all of
    it. A tied parameter may go by any of its names; if more are given the last counts. The result
    tells what was found: False for a parameter that `values` lacks, which stays as it is, and for a
    name that the model lacks, which is ignored (but the count that `average_parameters` keeps). So
    `all(copy_parameters(model, values).values())` says that the two fit.

    Raises `ValueError`, before anything is written, for a value of another shape, be it one that
    broadcasts, or of a kind that the parameter can't hold, as complex numbers in a real one.
    """
    parameters = _parameters(model)
    if values is None:
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}
    plain = names_of(model)
    aliases = {plain[k]: p for k, p in model.named_parameters(remove_duplicate=False)}
    given = {plain_name(k, aliases): v for k, v in values.items() if k != COUNT}
    sources = {k: _source(k, aliases[k], v) for k, v in given.items() if k in aliases}
    for name, source in sources.items():
        aliases[name].copy_(source)
    written = {id(aliases[name]) for name in sources}
    found = {name: id(parameter) in written for name, parameter in parameters.items()}
    return found | {name: name in aliases for name in given}


@torch.no_grad()
def average_parameters(model: nn.Module, averages: dict[str, Tensor]) -> None:
    """Take the parameters of `model` into the running average that `averages` holds, in place.

    `averages` begins as `copy_parameters(model)`. Every parameter a becomes a + (w − a)/(n + 1),
    and n, a float64 number under the name ".n", becomes n + 1; where there is none yet n is 1, for
    the dictionary holds one model. Integer and boolean parameters are copied. Entries narrower than
    float32 or than the model's are replaced by wider copies first, since averages in bfloat16 and
    float16 stand still; the average may live on another device than the model.

    Raises `ValueError`, before anything is changed, for a parameter that `averages` lacks or holds
    in another shape or as the very memory of the model, for a name that the model lacks, and for a
    count that is not a number ≥ 0.
    """
    parameters = _parameters(model)
    count = _count(averages)
    _check_averages(parameters, averages)
    means, live = [], []
    for name, parameter in parameters.items():
        if not (parameter.is_floating_point() or parameter.is_complex()):
            averages[name].copy_(parameter)
            continue
        dtype = wide(common(averages[name].dtype, parameter.dtype))
        averages[name] = averages[name].to(dtype)
        means.append(real(averages[name]))
        live.append(real(parameter.to(averages[name])))
    if means:
        torch._foreach_lerp_(means, live, 1.0 / (1.0 + count))
    averages[COUNT] = torch.tensor(count + 1.0, dtype=torch.float64)


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters by plain name, tied ones once."""
    plain = names_of(model)
    parameters: dict[str, Tensor] = {plain[k]: p for k, p in model.named_parameters()}
    for name, parameter in parameters.items():
        if is_lazy(parameter):
            raise ValueError(f"{name} has no shape yet: run one batch through the model first")
    return parameters


def _source(name: str, parameter: Tensor, value: Value) -> Tensor:
    """`value` as a tensor that `parameter.copy_` takes as it is meant."""
    if isinstance(value, Number):  # numbers at full width, not in torch's default one
        full = {float: torch.float64, complex: torch.complex128}.get(type(value))
        value = torch.tensor(value, dtype=full)
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: a {type(value).__name__} is neither a tensor nor a number")
    if value.dim() > 0 and value.shape != parameter.shape:
        raise ValueError(
            f"{name}: the parameter is {tuple(parameter.shape)}, the value {tuple(value.shape)}; "
            "give that shape or one number"
        )
    if not torch.can_cast(value.dtype, parameter.dtype):
        raise ValueError(f"{name}: the parameter is {parameter.dtype}, the value {value.dtype}")
    return value


def _count(averages: Mapping[str, Tensor]) -> float:
    count = torch.as_tensor(averages.get(COUNT, 1.0), dtype=torch.float64)
    if count.numel() != 1 or not 0 <= count.item() < float("inf"):
        raise ValueError(f"{COUNT} is {count.tolist()}: how many models, one number ≥ 0")
    return count.item()


def _check_averages(parameters: Mapping[str, Tensor], averages: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        if name not in averages:
            raise ValueError(f"{name} is not in the averages: start with copy_parameters(model)")
        mean = averages[name]
        if mean.shape != parameter.shape:
            raise ValueError(
                f"{name}: the parameter is {tuple(parameter.shape)}, "
                f"the average {tuple(mean.shape)}"
            )
        if mean.numel() and mean.data_ptr() == parameter.data_ptr():
            raise ValueError(
                f"{name}: the average is the model's own memory: start with copy_parameters(model)"
            )
    for name in averages:
        if name not in parameters and name != COUNT:
            raise ValueError(f"{name} is no parameter of the model, or its second name")
