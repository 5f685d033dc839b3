"""Which tensors an average is made of."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from torch import Tensor, nn

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


def accumulator(tensor: Tensor) -> Tensor:
    """A copy to sum into: at least float32, since bfloat16 and float16 averages stand still."""
    numbers = real(tensor.detach())
    return numbers.to(torch.promote_types(numbers.dtype, torch.float32), copy=True)


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
