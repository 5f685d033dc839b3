"""Which tensors an average is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

Named = Mapping[str, Tensor]
PREFIXES = ("module.", "_orig_mod.")  # of distributed and compiled models


def plain_name(name: str) -> str:
    """A parameter's name without the prefixes of distributed and compiled models.

    >>> plain_name("_orig_mod.module.layer.weight")
    'layer.weight'
    """
    while name.startswith(PREFIXES):
        name = name.split(".", 1)[1]
    return name


def named_tensors(source: nn.Module | Named) -> dict[str, Tensor]:
    """Parameters and persistent buffers by plain name, as aliases of the live tensors."""
    tensors = source.state_dict() if isinstance(source, nn.Module) else source
    return {plain_name(k): v for k, v in tensors.items()}


def same_memory(tensor: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """A key that tied tensors share."""
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def real(tensor: Tensor) -> Tensor:
    """A complex tensor as a real view of its memory; any other as it is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def accumulator(tensor: Tensor) -> Tensor:
    """A copy to sum into: at least float32, since bfloat16 and float16 averages stand still."""
    wide = tensor.dtype not in (torch.bfloat16, torch.float16)
    return real(tensor.detach()).to(dtype=None if wide else torch.float32, copy=True)


def check_names(mine: Sequence[str], theirs: Sequence[str]) -> None:
    """Raise `ValueError` with the first differences between two sets of names."""
    missing = [k for k in mine if k not in set(theirs)]
    foreign = [k for k in theirs if k not in set(mine)]
    if missing or foreign:
        raise ValueError(
            f"another model: {len(missing)} names missing ({', '.join(missing[:3]) or 'none'}), "
            f"{len(foreign)} unknown ({', '.join(foreign[:3]) or 'none'})"
        )
