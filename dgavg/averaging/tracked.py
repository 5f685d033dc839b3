"""Tracked: which tensors of a model an average follows, and where the live ones are."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from dgavg.averaging.parameters import (
    Named,
    all_tensors,
    check_same,
    plain_name,
    real,
    same_memory,
    unsaved_names,
)

POLICIES = ("average", "copy")
Policy = str | Callable[[str], str]  # "average", "copy", or which of them by a buffer's name


class Tracked:
    """The tensors of a model, sorted into those to average and those to copy.

    Floating and complex ones are averaged, integers, booleans and masks with infinities copied;
    tied ones stand once, under their first name; `buffers` says what becomes of floating buffers.
    With a mapping as source, `buffer_names` tells which of its names are buffers; without it all
    are taken for weights.

    `averaged` and `copied` are the names, in the order of every list of tensors; `owner` gives the
    name that stores each tensor, `unsaved` the buffers that a state dict leaves out.

    Raises `ValueError` for a policy that is none, and for tensors that can't be averaged.
    """

    def __init__(
        self, source: nn.Module | Named, buffers: Policy | None, buffer_names: frozenset[str] | None
    ) -> None:
        if buffers is None:
            known = isinstance(source, nn.Module) or buffer_names is not None
            buffers = "copy" if known else "average"
        if isinstance(buffers, str) and buffers not in POLICIES:
            raise ValueError(f"buffers={buffers!r}: choose average or copy")
        if buffers != "average" and buffer_names is None and isinstance(source, Mapping):
            raise ValueError(f"buffers={buffers!r} of a mapping: name its buffers in buffer_names")
        tensors = all_tensors(source)
        if isinstance(source, nn.Module):
            self.unsaved = unsaved_names(source)
            weights = dict(source.named_parameters(remove_duplicate=False))
            buffer_names = buffer_names or frozenset(tensors.keys() - all_tensors(weights).keys())
        else:
            self.unsaved = set()
        names = {plain_name(k) for k in buffer_names or ()}
        seen: dict[Any, str] = {}
        self.owner = {k: seen.setdefault(same_memory(t), k) for k, t in tensors.items()}
        self.averaged: list[str] = []
        self.copied: list[str] = []
        for name, tensor in tensors.items():
            if self.owner[name] != name:
                continue
            policy = _policy(buffers, name) if name in names else "average"
            number = tensor.is_floating_point() or tensor.is_complex()
            finite = number and policy == "average" and bool(tensor.isfinite().all())
            (self.averaged if finite else self.copied).append(name)  # a mask's -inf has no mean
        self.like = {k: t.detach().to("meta") for k, t in tensors.items()}
        self.found = 0  # how often the live tensors were looked up
        self._watch: _Watch | None = None
        self._live: tuple[list[Tensor], list[Tensor]] = ([], [])

    def live(self, source: nn.Module | Named) -> tuple[list[Tensor], list[Tensor]]:
        """The tensors of `source` to average (complex ones as pairs) and those to copy.

        The same two lists as long as `source` holds the same tensors in the same memory.

        Raises `ValueError` for a model with other names or shapes.
        """
        if self._watch is None or not self._watch.unchanged(source):
            tensors = all_tensors(source)
            check_same(self.like, tensors)
            self.like = {k: tensors[k].detach().to("meta") for k in self.like}
            averaged = [real(tensors[k].detach()) for k in self.averaged]
            self._live = (averaged, [tensors[k].detach() for k in self.copied])
            self._watch = _Watch(source)
            self.found += 1
        return self._live

    def named(self, averaged: list[Tensor], copied: list[Tensor]) -> dict[str, Tensor]:
        """Tensors in the order of `live` under all names of the model, in its dtypes."""
        found = dict(zip(self.copied, copied, strict=True))
        for name, tensor in zip(self.averaged, averaged, strict=True):
            found[name] = as_model(tensor, self.like[name])
        return {name: found[owner] for name, owner in self.owner.items()}

    def __getstate__(self) -> dict[str, Any]:
        """A copy looks for the live tensors itself."""
        return {**self.__dict__, "_watch": None, "_live": ([], [])}


def as_model(tensor: Tensor, like: Tensor) -> Tensor:
    """An accumulator in the dtype of the model's tensor `like`, complex again where that is."""
    if like.is_complex():
        tensor = torch.view_as_complex(tensor)
    return tensor.to(like.dtype)


def _policy(buffers: Policy, name: str) -> str:
    policy = buffers if isinstance(buffers, str) else buffers(name)
    if policy not in POLICIES:
        raise ValueError(f"buffers({name!r}) gave {policy!r}: choose average or copy")
    return policy


class _Watch:
    """Notices when a model or mapping holds other tensors than before, or in other memory.

    Cheap enough for every update: a few comparisons a tensor, in C.
    """

    def __init__(self, source: nn.Module | Named) -> None:
        self.source: Any = None
        self.dicts: list[Mapping[str, Any]] = []
        if isinstance(source, nn.Module):
            self.source = weakref.ref(source)
            parts = ((m._modules, m._parameters, m._buffers) for m in source.modules())
            self.dicts = list(chain.from_iterable(parts))
        self.parts = self._parts(source)
        self.tensors = [t for t in self.parts if isinstance(t, Tensor)]
        self.memory = [t.data_ptr() for t in self.tensors]

    def _parts(self, source: nn.Module | Named) -> list[Any]:
        if isinstance(source, nn.Module):
            return list(chain.from_iterable(map(dict.values, self.dicts)))  # type: ignore[arg-type]
        return list(source.values())

    def unchanged(self, source: nn.Module | Named) -> bool:
        """Whether `source` is as it was."""
        if isinstance(source, nn.Module):
            if self.source is None or self.source() is not source:
                return False
            parts = self._parts(source)
            if len(parts) != len(self.parts) or not all(map(is_, parts, self.parts)):
                return False
            return [t.data_ptr() for t in self.tensors] == self.memory
        return self.source is None and [t.data_ptr() for t in source.values()] == self.memory
