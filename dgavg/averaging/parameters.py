"""Which tensors a model has, under which names, and whether two models have the same."""

from __future__ import annotations

import sys
from collections.abc import Container, Hashable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

Named = Mapping[str, Tensor]


def plain_name(name: str, known: Container[str] = ()) -> str:
    """A parameter's name without the prefixes of distributed and compiled models and parts.

    `module.` goes as often as it takes to make one of the `known` names.

    >>> plain_name("_orig_mod.module.layer.weight"), plain_name("layer._orig_mod.weight")
    ('layer.weight', 'layer.weight')
    >>> plain_name("module.module.weight", known=["module.weight", "head.weight"])
    'module.weight'
    """
    name = name.replace("_orig_mod.", "")  # of torch.compile, on a part of the model too
    while name not in known and name.startswith("module."):  # of DataParallel, always outermost
        name = name.removeprefix("module.")
    return name


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """`plain_name` of each of all the names of a model: `module.` goes where every name has it.

    >>> plain_names(["module.module.weight", "module.head.weight"])
    {'module.module.weight': 'module.weight', 'module.head.weight': 'head.weight'}

    Raises `ValueError` where two names differ in such prefixes alone.
    """
    found = {name: name.replace("_orig_mod.", "") for name in names}
    while found and all(plain.startswith("module.") for plain in found.values()):
        found = {name: plain.removeprefix("module.") for name, plain in found.items()}
    if len(set(found.values())) != len(found):
        raise ValueError("two tensors have the same name but for '_orig_mod.'")
    return found


def names_of(model: nn.Module) -> dict[str, str]:
    """The plain names of all parameters and buffers, those it does not save too, by their own."""
    return plain_names(name for name, _ in _walk(model))


def buffers_of(model: nn.Module) -> frozenset[str]:
    """The plain names of the buffers."""
    plain = names_of(model)
    parameters = {plain[k] for k, _ in model.named_parameters(remove_duplicate=False)}
    return frozenset(plain.values()) - parameters


def named_tensors(source: nn.Module | Named) -> dict[str, Tensor]:
    """Parameters and persistent buffers by plain name, as aliases of the live tensors.

    What else a state dict may hold (`get_extra_state`, a tensor or not) is left out.

    Raises `ValueError` where two names differ in such prefixes alone, for what is neither a model
    nor a mapping of names to tensors, and for sharded and quantised tensors.
    """
    if not isinstance(source, nn.Module):
        return _plain(_tensors(source))
    plain, saved = names_of(source), _tensors(source.state_dict())
    plain |= {} if saved.keys() <= plain.keys() else plain_names({**plain, **saved})
    return {plain[name]: tensor for name, tensor in saved.items()}


def all_tensors(source: nn.Module | Named) -> dict[str, Tensor]:
    """As `named_tensors`, and the buffers that a model does not save; those of a mapping as given.

    Raises `ValueError` as that does, and for tensors that can't be averaged: lazy ones without a
    shape, sparse ones.
    """
    found = dict(_walk(source)) if isinstance(source, nn.Module) else _tensors(source)
    for name, tensor in found.items():
        if is_lazy(tensor):
            raise ValueError(f"{name} has no shape yet: run one batch before you make an average")
        if tensor.layout != torch.strided:
            raise ValueError(f"{name} is sparse: averages are of dense tensors")
        _check_whole(name, tensor)
    return _plain(found)


def unsaved_names(model: nn.Module) -> set[str]:
    """The plain names of the buffers that `model.state_dict()` leaves out."""
    plain = names_of(model)
    return {
        plain[f"{prefix}.{key}" if prefix else key]
        for prefix, module in model.named_modules(remove_duplicate=False)
        for key in module._non_persistent_buffers_set
        if module._buffers.get(key) is not None
    }


def _walk(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers in the order of `state_dict`, tied ones under each of their names."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for part in (module._parameters, module._buffers):
            for key, tensor in part.items():
                if tensor is not None:
                    yield (f"{prefix}.{key}" if prefix else key), tensor


def _tensors(found: Mapping[str, Any]) -> dict[str, Tensor]:
    """The entries of a state dict without the extra state of modules, which may be anything."""
    if not isinstance(found, Mapping):
        kind = "a class" if isinstance(found, type) else f"of type {type(found).__name__}"
        raise ValueError(f"the source is {kind}: give a model or a mapping of names to tensors")
    entries = {k: v for k, v in found.items() if str(k).rpartition(".")[2] != "_extra_state"}
    tensors: dict[str, Tensor] = {k: v for k, v in entries.items() if isinstance(v, Tensor)}
    if found and not any(isinstance(v, Tensor) for v in found.values()):
        for name, entry in entries.items():
            if isinstance(entry, Mapping) and any(isinstance(v, Tensor) for v in entry.values()):
                raise ValueError(f"no tensors, but a checkpoint: give its {name!r} entry")
        first = next(iter(found))
        raise ValueError(f"no tensors, {first} is {type(found[first]).__name__}: give a state dict")
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise ValueError(f"{name!r} is no name: give a mapping of names to tensors")
        _check_whole(name, tensor)
    return tensors


def _check_whole(name: str, tensor: Tensor) -> None:
    """Raise `ValueError` for a tensor that has no numbers of its own to average."""
    sharding = sys.modules.get("torch.distributed.tensor")  # slow to import
    if sharding is not None and isinstance(tensor, sharding.DTensor):
        raise ValueError(f"{name} is a DTensor: sharded models are not supported")
    if tensor.is_quantized:
        raise ValueError(f"{name} is quantised: average before quantising")


def _plain(tensors: Named) -> dict[str, Tensor]:
    plain = plain_names(tensors)
    return {plain[name]: tensor for name, tensor in tensors.items()}


def same_memory(tensor: Tensor) -> tuple[Hashable, ...]:
    """A key that tied tensors share."""
    return tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def real(tensor: Tensor) -> Tensor:
    """A complex tensor as a real view of its memory; any other as it is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """What to sum numbers of `dtype` in: bfloat16 and float16 averages stand still."""
    return common(dtype, torch.float32)


def common(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    """What holds the numbers of both; those of 8 bits too, which torch does not promote."""
    if one == other:
        return one
    one, other = (
        torch.bfloat16 if d.is_floating_point and d.itemsize == 1 else d for d in (one, other)
    )
    return torch.promote_types(one, other)


def same_values(one: Tensor, other: Tensor) -> bool:
    """`torch.equal` across devices and dtypes, in the latter of `one`; floats of 8 bits too."""
    other = other.to(one.device, one.dtype)
    if one.is_floating_point() and one.dtype.itemsize == 1:
        one, other = one.float(), other.float()
    return torch.equal(one, other)


def check_same(mine: Named, theirs: Named) -> None:
    """Raise `ValueError` with the first differences in the names, then in the shapes."""
    missing = [k for k in mine if k not in theirs]
    foreign = [k for k in theirs if k not in mine]
    if missing or foreign:
        raise ValueError(
            f"another model: {len(missing)} names missing ({', '.join(missing[:3]) or 'none'}), "
            f"{len(foreign)} unknown ({', '.join(foreign[:3]) or 'none'})"
        )
    for name, tensor in mine.items():
        if tensor.shape != theirs[name].shape:
            raise ValueError(
                f"another model: {name} is {tuple(theirs[name].shape)}, "
                f"the average {tuple(tensor.shape)}"
            )
