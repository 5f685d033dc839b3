"""Mixture: a combination of whole models that are seen one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

from dgavg.averaging.parameters import (
    Named,
    check_same,
    named_tensors,
    real,
    same_memory,
    same_values,
    wide,
)

Source: TypeAlias = nn.Module | Named | Callable[[], nn.Module | Named]
"""A module, its tensors by name, or a function that loads them: then one is in memory at a time."""


def several(models: Iterable[Source]) -> Iterable[Source]:
    """`models`. Raises `ValueError` for a single one."""
    one = isinstance(models, nn.Module | Mapping) and not isinstance(models, nn.ModuleList)
    if one or not isinstance(models, Iterable):
        raise ValueError(f"models is one {type(models).__name__}: give a list of models")
    return models


def tensors_of(model: Source, place: str) -> dict[str, Tensor]:
    """The tensors of `model` by plain name, aliases of what it holds or loads.

    Raises `ValueError` for anything else than a `Source`; `place` is what the message calls it.
    """
    found = model
    if callable(model) and not isinstance(model, nn.Module | Mapping | type):
        found = model()
    if not isinstance(found, nn.Module | Mapping):
        raise ValueError(
            f"{place} is {type(found).__name__}: give a module, a mapping of tensors by name, or a "
            "function of no arguments that loads one"
        )
    try:
        return {name: tensor.detach() for name, tensor in named_tensors(found).items()}
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def require_same(tensors: Named, place: str, like: Named, other: str) -> None:
    """Raise `ValueError` where the names or shapes of two models differ; both are called so."""
    try:
        check_same(like, tensors)
    except ValueError as error:
        raise ValueError(f"{place} and {other} differ: {error}") from None


def move(start: Tensor, end: Tensor, rate: float) -> Tensor:
    """start + rate·(end − start), in place; what is equal in both stays so, infinities too."""
    if rate in (0.0, 1.0):
        return start.copy_(end) if rate else start
    end = end.to(start.device, start.dtype)
    same = start == end
    return torch.where(same, end, start.lerp_(end, rate), out=start)


class Mixture:
    """A combination of models, begun with one and moved towards others by `add`.

    Floating and complex tensors are mixed in at least float32, each tied one once; integers and
    booleans are those of the model added last. Holds one model in that precision; while it works, a
    tensor where it converts and a boolean for each number of one. `place` is what messages call the
    model.
    """

    def __init__(self, tensors: Named, place: str) -> None:
        if not tensors:
            raise ValueError(f"{place} has no tensors")
        seen: dict[object, str] = {}
        self._owner = {k: seen.setdefault(same_memory(v), k) for k, v in tensors.items()}
        self._like = {k: torch.empty_like(v, device="meta") for k, v in tensors.items()}
        self._held = {k: _wide(tensors[k]) for k in seen.values()}
        self._place = place

    @torch.no_grad()
    def add(
        self,
        tensors: Named,
        rate: float | Mapping[str, float],
        place: str,
        *,
        integers: bool = True,
    ) -> None:
        """Move towards a model by `rate` in [0, 1], or by a rate for each name.

        Without `integers` those stay as they are. Raises `ValueError` for another model.
        """
        self._check(tensors, place)
        for name, held in self._held.items():
            step = rate if isinstance(rate, float) else rate[name]
            if self._numeric(name):
                move(held, real(tensors[name]), step)
            elif integers:
                self._held[name] = tensors[name].to(held.device, copy=True)

    @torch.no_grad()
    def preview(self, tensors: Named, rate: float, place: str) -> dict[str, Tensor]:
        """The weights that there would be after `add`, in memory of their own."""
        self._check(tensors, place)
        mixed = {
            name: self._narrow(name, move(held.clone(), real(tensors[name]), rate))
            if self._numeric(name)
            else tensors[name].to(held.device, copy=True)
            for name, held in self._held.items()
        }
        return {name: mixed[owner] for name, owner in self._owner.items()}

    def weights(self) -> dict[str, Tensor]:
        """What there is now, in the dtypes of the first model; borrowed where they allow it."""
        mixed = {name: self._narrow(name, held) for name, held in self._held.items()}
        return {name: mixed[owner] for name, owner in self._owner.items()}

    def _numeric(self, name: str) -> bool:
        return _is_numeric(self._like[name])

    def _narrow(self, name: str, held: Tensor) -> Tensor:
        dtype = self._like[name].dtype
        return (torch.view_as_complex(held) if dtype.is_complex else held).to(dtype)

    def _check(self, tensors: Named, place: str) -> None:
        require_same(tensors, place, self._like, self._place)
        for name, like in self._like.items():
            tensor, owner = tensors[name], self._owner[name]
            if _kind(tensor) != _kind(like):
                raise ValueError(
                    f"{place} and {self._place} differ: {name} is {tensor.dtype} in the one and "
                    f"{like.dtype} in the other"
                )
            tied = same_memory(tensor) == same_memory(tensors[owner])
            if not tied and not same_values(tensor, tensors[owner]):
                raise ValueError(
                    f"{place} and {self._place} differ: {owner} and {name} are tied in the latter"
                )


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


def _is_numeric(tensor: Tensor) -> bool:
    return any(_kind(tensor))


def _wide(tensor: Tensor) -> Tensor:
    """A copy to mix into: complex numbers as pairs, at least float32; integers as they are."""
    if not _is_numeric(tensor):
        return tensor.clone()
    numbers = real(tensor)
    return numbers.to(wide(numbers.dtype), copy=True)
