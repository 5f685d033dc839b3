"""Which tensors a model has, under which names, and whether two models have the same."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

Named = Mapping[str, Tensor]


def plain_name(name: str) -> str:
    """A parameter's name without the prefixes of distributed and compiled models and parts.

    >>> plain_name("_orig_mod.module.layer.weight"), plain_name("layer._orig_mod.weight")
    ('layer.weight', 'layer.weight')
    """
    name = name.replace("_orig_mod.", "")  # of torch.compile, on a part of the model too
    while name.startswith("module."):  # of DataParallel, always outermost
        name = name.removeprefix("module.")
    return name


def named_tensors(source: nn.Module | Named) -> dict[str, Tensor]:
    """Parameters and persistent buffers by plain name, as aliases of the live tensors.

    Raises `ValueError` where two names differ in such prefixes alone.
    """
    tensors = source.state_dict() if isinstance(source, nn.Module) else source
    return _plain(tensors)


def all_tensors(source: nn.Module | Named) -> dict[str, Tensor]:
    """As `named_tensors`, and the buffers that a model does not save; those of a mapping as given.

    Raises `ValueError` for tensors that can't be averaged: lazy ones without a shape, sparse ones.
    """
    found = dict(_walk(source)) if isinstance(source, nn.Module) else source
    for name, tensor in found.items():
        if is_lazy(tensor):
            raise ValueError(f"{name} has no shape yet: run one batch before you make an average")
        if tensor.layout != torch.strided:
            raise ValueError(f"{name} is sparse: averages are of dense tensors")
    return _plain(found)


def unsaved_names(model: nn.Module) -> set[str]:
    """The plain names of the buffers that `model.state_dict()` leaves out."""
    return {
        plain_name(f"{prefix}.{key}" if prefix else key)
        for prefix, module in model.named_modules(remove_duplicate=False)
        for key in module._non_persistent_buffers_set
    }


def _walk(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers in the order of `state_dict`, tied ones under each of their names."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for part in (module._parameters, module._buffers):
            for key, tensor in part.items():
                if tensor is not None:
                    yield (f"{prefix}.{key}" if prefix else key), tensor


def _plain(tensors: Named) -> dict[str, Tensor]:
    plain = {plain_name(k): v for k, v in tensors.items()}
    if len(plain) != len(tensors):
        raise ValueError("two tensors have the same name but for 'module.' or '_orig_mod.'")
    return plain


def same_memory(tensor: Tensor) -> tuple[Hashable, ...]:
    """A key that tied tensors share."""
    return tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def real(tensor: Tensor) -> Tensor:
    """A complex tensor as a real view of its memory; any other as it is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """What to sum numbers of `dtype` in: bfloat16 and float16 averages stand still."""
    return torch.promote_types(dtype, torch.float32)


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
