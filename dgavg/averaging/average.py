"""WeightAverage: the storage and the update that every running average shares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dgavg.averaging.parameters import (
    Named,
    accumulator,
    check_same,
    named_tensors,
    plain_name,
    real,
    same_memory,
)

BUFFERS = ("average", "copy")


class WeightAverage:
    """A convex combination of the weights a model has had, updated in place.

    A subclass says how much the newest weights count (`rate`). Floating tensors are averaged in at
    least float32, complex ones too; integers, booleans and masks with infinities are copied; tied
    parameters are averaged once. `buffers` says whether floating buffers are averaged or copied;
    with a mapping as source, `buffer_names` tells which of its names are buffers. The first update
    copies.

    Raises `ValueError` for a model with other names or shapes.
    """

    def __init__(
        self,
        source: nn.Module | Named,
        *,
        buffers: str = "average",
        buffer_names: frozenset[str] | None = None,
    ) -> None:
        if buffers not in BUFFERS:
            raise ValueError(f"buffers={buffers!r}: choose average or copy")
        if buffers == "copy" and buffer_names is None and isinstance(source, Mapping):
            raise ValueError("buffers='copy' of a mapping: name its buffers in buffer_names")
        self.count = 0
        tensors = named_tensors(source)
        if buffer_names is None and isinstance(source, nn.Module):
            weights = dict(source.named_parameters(remove_duplicate=False))
            buffer_names = frozenset(tensors.keys() - named_tensors(weights).keys())
        copied = {plain_name(k) for k in buffer_names or ()} if buffers == "copy" else set()
        seen: dict[Any, str] = {}
        self._owner = {  # name -> the name that stores its tensor
            name: seen.setdefault(same_memory(tensor), name) for name, tensor in tensors.items()
        }
        self._averaged: dict[str, Tensor] = {}  # complex ones as pairs of real numbers
        self._copied: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if self._owner[name] != name:
                continue
            fits = (tensor.is_floating_point() or tensor.is_complex()) and name not in copied
            if fits and bool(tensor.isfinite().all()):  # an attention mask's -inf has no mean
                self._averaged[name] = accumulator(tensor)
            else:
                self._copied[name] = tensor.detach().clone()
        self._dtypes = {k: tensors[k].dtype for k in self._averaged}
        self._plan: tuple[list[int], list[Tensor], list[Tensor]] | None = None
        self._narrow = False  # some live tensor is not in the dtype of its average

    def rate(self) -> float:
        """The weight of the newest model in the next update, in [0, 1]."""
        raise NotImplementedError

    @torch.no_grad()
    def update(self, source: nn.Module | Named) -> None:
        """Take in the weights that `source` has now."""
        live, copied = self._live(source)
        means = list(self._averaged.values())
        if means and self.count == 0:
            torch._foreach_copy_(means, live)
        elif means:
            if self._narrow:
                live = [t.to(m.dtype) for t, m in zip(live, means, strict=True)]
            torch._foreach_lerp_(means, live, self.rate())
        if copied:
            torch._foreach_copy_(list(self._copied.values()), copied)
        self.count += 1

    def _live(self, source: nn.Module | Named) -> tuple[list[Tensor], list[Tensor]]:
        """The tensors to average and those to copy, in the order of `_averaged` and `_copied`.

        Cached for a mapping as long as it holds the same memory.
        """
        memory = [t.data_ptr() for t in source.values()] if isinstance(source, Mapping) else []
        if memory and self._plan is not None and self._plan[0] == memory:
            return self._plan[1:]
        tensors = named_tensors(source)
        stored = self._stored()
        check_same({name: stored[k] for name, k in self._owner.items()}, tensors)
        live = [real(tensors[k].detach()) for k in self._averaged]
        copied = [tensors[k].detach() for k in self._copied]
        self._plan = (memory, live, copied)
        self._narrow = any(
            t.dtype != m.dtype for t, m in zip(live, self._averaged.values(), strict=True)
        )
        return live, copied

    def _stored(self) -> dict[str, Tensor]:
        """What is stored, each tensor once, in the model's shapes but not always its dtypes."""
        return {
            k: torch.view_as_complex(v) if self._dtypes[k].is_complex else v
            for k, v in self._averaged.items()
        } | self._copied

    def weights(self) -> dict[str, Tensor]:
        """The average by name, in the model's dtypes: borrowed memory where they allow it.

        Raises `ValueError` before the first update.
        """
        self._check_started()
        stored = {k: v.to(self._dtypes.get(k, v.dtype)) for k, v in self._stored().items()}
        return {name: stored[owner] for name, owner in self._owner.items()}

    @torch.no_grad()
    def copy_to(self, target: nn.Module | Named) -> None:
        """Write the average into the model, in place; copied tensors stay as the model has them.

        Raises `ValueError` before the first update.
        """
        self._check_started()
        live, _ = self._live(target)
        if live:
            torch._foreach_copy_(live, list(self._averaged.values()))

    def _check_started(self) -> None:
        if self.count == 0:
            raise ValueError("no weights have been averaged yet")

    def state_dict(self) -> dict[str, Any]:
        """Count and tensors, as aliases."""
        return {"count": self.count, "tensors": self._averaged | self._copied}

    @torch.no_grad()
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave, in place.

        Raises `ValueError` for the state of another model.
        """
        mine = self._averaged | self._copied
        check_same(mine, saved["tensors"])
        for name, tensor in mine.items():
            tensor.copy_(saved["tensors"][name])
        self.count = saved["count"]
