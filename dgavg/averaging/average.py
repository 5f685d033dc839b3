"""WeightAverage: the storage and the update that every running average shares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dgavg.averaging.parameters import (
    Named,
    accumulator,
    check_names,
    named_tensors,
    real,
    same_memory,
)

BUFFERS = ("average", "copy")


class WeightAverage:
    """A convex combination of the weights a model has had, updated in place.

    A subclass says how much the newest weights count (`rate`). Floating tensors are averaged in at
    least float32, complex ones too; integers and booleans are copied; tied parameters are averaged
    once. `buffers` says whether floating buffers are averaged or copied; with a mapping as source,
    `buffer_names` tells which of its names are buffers. The first update copies.

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
        self.count = 0
        self.buffers = buffers
        tensors = named_tensors(source)
        if buffer_names is None and isinstance(source, nn.Module):
            buffer_names = (
                frozenset(tensors) - named_tensors(dict(source.named_parameters())).keys()
            )
        copied = buffer_names if buffers == "copy" and buffer_names else frozenset()
        self._owner: dict[str, str] = {}  # name -> the name that stores its tensor
        seen: dict[Any, str] = {}
        for name, tensor in tensors.items():
            self._owner[name] = (
                seen.setdefault(same_memory(tensor), name) if tensor.numel() else name
            )
        owners = {k: v for k, v in tensors.items() if self._owner[k] == k}
        floats = {k for k, v in owners.items() if v.is_floating_point() or v.is_complex()}
        self._averaged = {k: accumulator(v) for k, v in owners.items() if k in floats - copied}
        self._copied = {k: v.detach().clone() for k, v in owners.items() if k not in self._averaged}
        self._dtypes = {k: v.dtype for k, v in owners.items()}
        self._means = list(self._averaged.values())
        self._plan: tuple[nn.Module | Named, list[Tensor], bool] | None = None

    def rate(self) -> float:
        """The weight of the newest model in the next update, in [0, 1]."""
        raise NotImplementedError

    @torch.no_grad()
    def update(self, source: nn.Module | Named) -> None:
        """Take in the weights that `source` has now."""
        live, narrow = self._live(source)
        if narrow:
            live = [t.to(m.dtype) for t, m in zip(live, self._means, strict=True)]
        if self.count == 0:
            torch._foreach_copy_(self._means, live)
        else:
            torch._foreach_lerp_(self._means, live, self.rate())
        if self._copied:
            tensors = named_tensors(source)
            for name, copy in self._copied.items():
                copy.copy_(tensors[name])
        self.count += 1

    def _live(self, source: nn.Module | Named) -> tuple[list[Tensor], bool]:
        """The tensors to average, cached for a mapping, which aliases the same ones every time."""
        if self._plan is not None and self._plan[0] is source and isinstance(source, Mapping):
            return self._plan[1:]
        tensors = named_tensors(source)
        check_names(list(self._owner), list(tensors))
        for name, mean in (self._averaged | self._copied).items():
            if real(tensors[name]).shape != mean.shape:
                raise ValueError(
                    f"another model: {name} is {tuple(tensors[name].shape)}, "
                    f"the average {tuple(mean.shape)}"
                )
        live = [real(tensors[k].detach()) for k in self._averaged]
        narrow = any(t.dtype != m.dtype for t, m in zip(live, self._means, strict=True))
        self._plan = (source, live, narrow)
        return live, narrow

    def weights(self) -> dict[str, Tensor]:
        """The average by name, in the model's dtypes: borrowed memory where they allow, else copies.

        Raises `ValueError` before the first update.
        """
        if self.count == 0:
            raise ValueError("no weights have been averaged yet")
        stored = {
            k: torch.view_as_complex(v) if self._dtypes[k].is_complex else v.to(self._dtypes[k])
            for k, v in self._averaged.items()
        } | self._copied
        return {name: stored[owner] for name, owner in self._owner.items()}

    @torch.no_grad()
    def copy_to(self, target: nn.Module | Named) -> None:
        """Write the average into the model, in place; copied tensors stay as the model has them."""
        live, _ = self._live(target)
        torch._foreach_copy_(live, self._means)

    def state_dict(self) -> dict[str, Any]:
        """Count and tensors, as aliases."""
        return {"count": self.count, "tensors": self._averaged | self._copied}

    @torch.no_grad()
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave, in place.

        Raises `ValueError` for the state of another model.
        """
        mine = self._averaged | self._copied
        check_names(list(mine), list(saved["tensors"]))
        for name, tensor in mine.items():
            tensor.copy_(saved["tensors"][name])
        self.count = saved["count"]
