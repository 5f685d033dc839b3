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
    buffers_of,
    check_same,
    plain_name,
    real,
    same_memory,
    same_values,
    unsaved_names,
)

STATISTICS = ("running_mean", "running_var")  # of normalisation layers: never masks
POLICIES = ("average", "copy")
Policy = str | Callable[[str], str]  # "average", "copy", or which of them by a buffer's name


class Tracked:
    """The tensors of a model, sorted into those to average and those to copy.

    Floating and complex ones are averaged, integers and booleans copied; tied ones stand once,
    under their first name; `buffers` says what becomes of floating buffers. `buffer_names` adds to
    the buffers of a module; with a mapping as source it tells which of its names are buffers, and
    without it all are taken for weights: masks with infinities are copied then.

    An averaged buffer, but for running statistics, may be or become a mask, and a mean of
    infinities is NaN. So it is copied as well, and where its mean is not finite, `finite` takes the
    copy.

    `averaged` and `copied` are the names, in the order of every list of tensors; lists of those
    copied go on with these averaged buffers, whose places among the averaged are `guarded`. `owner`
    gives the name that stores each tensor, `unsaved` the buffers that a state dict leaves out,
    `buffers` the names of all, `following` those of floating ones that policy alone has copied.

    Raises `ValueError` for a policy that is none, for names of buffers that the source does not
    have, and for tensors that can't be averaged.
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
        else:
            self.unsaved = set()
        self.buffers = names = _buffers(source, tensors, buffer_names)
        seen: dict[Any, str] = {}
        self.owner = {k: seen.setdefault(same_memory(t), k) for k, t in tensors.items()}
        self.averaged: list[str] = []
        self.copied: list[str] = []
        self.guarded: list[int] = []
        self.following: list[str] = []
        for name, tensor in tensors.items():
            if self.owner[name] != name:
                continue
            policy = _policy(buffers, name) if name in names else "average"
            averaged = _has_mean(name, tensor, name in names)
            if averaged and policy == "copy":
                self.following.append(name)
                averaged = False
            if averaged and name in names and name.rpartition(".")[2] not in STATISTICS:
                self.guarded.append(len(self.averaged))
            (self.averaged if averaged else self.copied).append(name)
        self.like = {k: t.detach().to("meta") for k, t in tensors.items()}
        self._watch: _Watch | None = None
        self._live: tuple[list[Tensor], list[Tensor]] = ([], [])

    def live(self, source: nn.Module | Named) -> tuple[list[Tensor], list[Tensor]]:
        """The tensors of `source` to average (complex ones as pairs) and those to copy.

        The same two lists as long as `source` holds the same tensors in the same memory.

        Raises `ValueError` for a model with other names, shapes or ties.
        """
        if self._watch is None or not self._watch.unchanged(source):
            tensors = self._checked(source)
            for name, like in self.like.items():
                if tensors[name].dtype != like.dtype:
                    self.like[name] = tensors[name].detach().to("meta")
            self._live = self._sorted(tensors)
            self._watch = _Watch(source)
        return self._live

    def peek(self, source: nn.Module | Named) -> tuple[list[Tensor], list[Tensor]]:
        """As `live`, of a model that is looked at this once."""
        if self._watch is not None and self._watch.unchanged(source):
            return self._live
        return self._sorted(self._checked(source))

    def _checked(self, source: nn.Module | Named) -> dict[str, Tensor]:
        tensors = all_tensors(source)
        check_same(self.like, tensors)
        for name, owner in self.owner.items():
            if name != owner:
                _check_tied(tensors, name, owner)
        return tensors

    def _sorted(self, tensors: Named) -> tuple[list[Tensor], list[Tensor]]:
        averaged = [real(tensors[k].detach()) for k in self.averaged]
        copied = [tensors[k].detach() for k in self.copied]
        return averaged, copied + [averaged[i] for i in self.guarded]

    def names_copied(self) -> list[str]:
        """A name for each in a list of those copied, for checkpoints."""
        return [*self.copied, *(f"newest/{self.averaged[i]}" for i in self.guarded)]

    def finite(self, averaged: list[Tensor], copied: list[Tensor]) -> list[Tensor]:
        """`averaged`, with the copy of a buffer where its mean is infinite or NaN."""
        found = list(averaged)
        if _all_finite([averaged[i] for i in self.guarded]):
            return found
        for i, newest in zip(self.guarded, copied[len(self.copied) :], strict=True):
            mean = averaged[i]
            found[i] = torch.where(mean.isfinite(), mean, newest.to(mean.device, mean.dtype))
        return found

    def named(self, averaged: list[Tensor], copied: list[Tensor]) -> dict[str, Tensor]:
        """Tensors in the order of `live` under all names of the model, in its dtypes."""
        found = dict(zip(self.copied, copied, strict=False))  # those guarded follow
        for name, tensor in zip(self.averaged, self.finite(averaged, copied), strict=True):
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


def _all_finite(tensors: list[Tensor]) -> bool:
    """False where the norm is not; a device is waited for once."""
    if not tensors:
        return True
    norms = torch._foreach_norm(tensors)
    return bool(torch.stack([n.to(norms[0]) for n in norms]).isfinite().all())


def _buffers(
    source: nn.Module | Named, tensors: Named, given: frozenset[str] | None
) -> frozenset[str]:
    """The names of the buffers, those `given` among them."""
    if isinstance(given, str):
        raise ValueError(f"buffer_names={given!r}: a set of names")
    found = frozenset(plain_name(name, tensors) for name in given or ())
    known = set(tensors)
    if not isinstance(source, nn.Module):  # extra state too
        known |= {plain_name(name, tensors) for name in source}
    unknown = sorted(found - known)
    if unknown:
        raise ValueError(f"buffer_names has {', '.join(unknown[:3])}: no tensors of the source")
    return found | buffers_of(source) if isinstance(source, nn.Module) else found


def _has_mean(name: str, tensor: Tensor, is_buffer: bool) -> bool:
    if tensor.is_meta:
        raise ValueError(f"{name} has no values yet: move the model off the meta device first")
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return False
    # A mask's -inf has no mean; of buffers `finite` takes care, whenever it gets there.
    return is_buffer or tensor.requires_grad or not bool(tensor.isinf().any())


def _policy(buffers: Policy, name: str) -> str:
    policy = buffers if isinstance(buffers, str) else buffers(name)
    if policy not in POLICIES:
        raise ValueError(f"buffers({name!r}) gave {policy!r}: choose average or copy")
    return policy


def _check_tied(tensors: Named, name: str, owner: str) -> None:
    """Copies of tied tensors will do, as long as they are equal."""
    one, other = tensors[name].detach(), tensors[owner].detach()
    if same_memory(one) != same_memory(other) and not same_values(one, other):
        raise ValueError(f"{owner} and {name} were tied but now differ: make a new average")


_END = object()


class _Watch:
    """Notices when a model or mapping holds other tensors than before, or in other memory.

    Cheap enough for every update: a few comparisons a tensor, in C. It keeps the tensors alive, so
    that no other takes their memory unnoticed.
    """

    def __init__(self, source: nn.Module | Named) -> None:
        dicts: list[Any] = [source]
        if isinstance(source, nn.Module):
            found = ((m._modules, m._parameters, m._buffers) for m in source.modules())
            dicts = list(chain.from_iterable(found))
        self.source = weakref.ref(source) if isinstance(source, nn.Module) else lambda: source
        self.is_plain = all(isinstance(d, dict) for d in dicts)  # not so in a scripted module
        self.values = [d.values() for d in dicts]
        self.parts = [*chain.from_iterable(self.values), _END]
        self.tensors = [t for t in self.parts if isinstance(t, Tensor)]
        self.memory = [t.data_ptr() for t in self.tensors]
        self.layout = None if isinstance(source, nn.Module) else _layout(source)

    def unchanged(self, source: nn.Module | Named) -> bool:
        """Whether `source` is as it was."""
        if self.is_plain and self.source() is source:
            parts = chain(chain.from_iterable(self.values), (_END,))
            if all(map(is_, parts, self.parts)):
                return list(map(Tensor.data_ptr, self.tensors)) == self.memory
        return isinstance(source, Mapping) and _layout(source) == self.layout


def _layout(source: Named) -> list[tuple[Any, ...]]:
    return [
        (k, t.data_ptr(), t.dtype, t.shape, t.stride())
        for k, t in source.items()
        if isinstance(t, Tensor)
    ]
