"""WeightAverage: what every average of a model's weights has in common."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dgavg.averaging.lent import lent
from dgavg.averaging.pairs import Pairs, moved, room
from dgavg.averaging.parameters import Named, check_same, real
from dgavg.averaging.tracked import Policy, Tracked


class WeightAverage(ABC):
    """An average of the weights that a model has had; call `update` after each optimizer step.

    - `start` (0): updates before the first that counts; `interval` (1): updates between two that
      count. The first that counts copies.
    - `device` (none): where the average lives; by default with the model, also when that moves.
    - `buffers` ("copy"): floating buffers, such as batch-norm statistics, follow the model or are
      averaged ("average"); a function decides by name. `buffer_names` are names to take for
      buffers: beside a module's own, and of a mapping of tensors, which has none without it.

    Floating tensors are averaged in at least float32, complex ones too; integers and booleans are
    copied, of buffers also each number without a finite mean (as in masks); tied parameters are
    averaged once; parametrized modules (as weight norm) in the parameters that are trained. Names
    have no prefix of compiled or distributed models. The model's tensors are looked up once, and
    again whenever it has others; until then, or as long as the average lives, they stay in memory.

    `calls` counts updates asked for, `count` those that counted.

    Raises `ValueError` for a model with other names or shapes, and for tensors that have no average
    here: sharded, quantised and sparse ones.
    """

    def __init__(
        self,
        source: nn.Module | Named,
        *,
        start: int = 0,
        interval: int = 1,
        device: torch.device | str | None = None,
        buffers: Policy | None = None,
        buffer_names: frozenset[str] | None = None,
    ) -> None:
        if not (0 <= start < math.inf and start == int(start)):
            raise ValueError(f"start={start}: a number of updates from 0 on")
        if not (1 <= interval < math.inf and interval == int(interval)):
            raise ValueError(f"interval={interval}: a number of updates from 1 on")
        self.start, self.interval = int(start), int(interval)
        self.device = None if device is None else torch.empty(0, device=device).device
        self.calls = 0
        self.count = 0
        with _lasting():
            self.tracked = Tracked(source, buffers, buffer_names)
            live, copied = self.tracked.live(source)
            dtypes = [t.dtype for t in copied]
            self._copied: list[Tensor] = room(copied, dtypes, self._devices(copied))
            self._copying = Pairs(self._copied, copied)
            self._allocate(live)

    @abstractmethod
    def _allocate(self, live: list[Tensor]) -> None:
        """Make room for an average of tensors such as `live`."""

    @abstractmethod
    def _take(self, live: list[Tensor]) -> None:
        """Take in the weights; `count` is the number of those before."""

    @abstractmethod
    def _means(self) -> list[Tensor]:
        """The average of each tensor, in the order of `live`."""

    @abstractmethod
    def _stored(self) -> dict[str, Tensor]:
        """What `_take` writes to, by a name of its own: what a checkpoint holds."""

    def _history(self, count: int) -> dict[str, Tensor]:
        """More of that, which grows: the part that `count` updates have filled."""
        return {}

    @abstractmethod
    def _follow(self, live: list[Tensor]) -> None:
        """Move to where the tensors of the model are now."""

    @torch.no_grad()
    def update(self, source: nn.Module | Named) -> None:
        """Take in the weights that `source` has now, where this call is one that counts."""
        since = self.calls - self.start
        if since >= 0 and since % self.interval == 0:
            live, _ = self._find(source)
            self._take(live)
            self._copying.copy()
            self.count += 1
        self.calls += 1

    def _find(self, source: nn.Module | Named) -> tuple[list[Tensor], list[Tensor]]:
        """The live tensors; where they are others than before, the average follows them."""
        live, copied = self.tracked.live(source)
        if self._copying.sources is not copied:
            with _lasting():
                self._follow(live)
                dtypes = [t.dtype for t in copied]
                self._copied = moved(self._copied, copied, dtypes, self._devices(copied))
                self._copying = Pairs(self._copied, copied)
        return live, copied

    def _devices(self, live: list[Tensor]) -> list[torch.device]:
        """Where the average of each tensor belongs."""
        return [self.device or t.device for t in live]

    def weights(self) -> dict[str, Tensor]:
        """The average by name, as `load_state_dict` takes it, in the model's dtypes.

        Borrowed memory where they allow it: clone what you keep.

        Raises `ValueError` before the first update that counts.
        """
        self.check_started()
        return self._by_name(self._means())

    def _by_name(self, averaged: list[Tensor]) -> dict[str, Tensor]:
        """Tensors such as `_means()`, and those copied, under the names of a state dict."""
        found = self.tracked.named(averaged, self._copied)
        return {k: v for k, v in found.items() if k not in self.tracked.unsaved}

    @torch.no_grad()
    def copy_to(self, target: nn.Module | Named) -> None:
        """Write the average into the model, in place.

        Raises `ValueError` before the first update that counts.
        """
        self.check_started()
        self._write(target, self._means())

    def _write(self, target: nn.Module | Named, averaged: list[Tensor]) -> None:
        """Write tensors such as `_means()`, and those copied, into the model."""
        live, copied = self.tracked.peek(target)
        write(copied, self._copied)  # first, as averaged buffers are among them
        write(live, self.tracked.finite(averaged, self._copied))

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """In this block `model` has the averaged weights; afterwards its own again, come what may.

        Before the first update that counts the model stays as it is. One copy of the average on the
        way in, none on the way out: for the block, the model's tensors stand in memory of their
        own, so nothing that happens there (recalibrating batch norm, training) reaches the average
        or lasts. Memory: one more copy of the model in the block.
        """
        if self.count == 0:
            yield
            return
        with self._lent(model, self._means):
            yield

    @contextmanager
    def _lent(self, model: nn.Module, averaged: Callable[[], list[Tensor]]) -> Iterator[None]:
        """In this block `model` has tensors such as `_means()`, and those copied."""
        self.tracked.peek(model)  # is it this model?
        with lent(model, self.tracked.owner) as fresh:
            with torch.no_grad():
                self._fill(fresh, averaged())
            yield

    def _fill(self, target: Named, averaged: list[Tensor]) -> None:
        """Write into tensors by name."""
        copied = [target[name] for name in self.tracked.copied]
        write(copied, self._copied[: len(copied)])
        live = [real(target[name]) for name in self.tracked.averaged]
        write(live, self.tracked.finite(averaged, self._copied))

    def attach(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> RemovableHandle:
        """From now on `update(model)` after every step that `optimizer` really takes.

        Steps that a `GradScaler` skips don't count, those of fused optimizers neither (there the
        skip is known on the device alone, so each step waits for it). `handle.remove()` ends it.
        """
        return after_steps(optimizer, model, self.update)

    def check_started(self) -> None:
        """Raise `ValueError` where nothing has been averaged yet."""
        if self.count == 0:
            raise ValueError("no weights have been averaged yet")

    def restart(self) -> None:
        """Forget everything averaged so far: the next update that counts copies."""
        self.calls = self.count = 0

    def state_dict(self) -> dict[str, Any]:
        """What kind of average it is, counters and tensors, as aliases."""
        return {
            "average": self._identity(),
            "calls": self.calls,
            "count": self.count,
            "tensors": self._all_stored(self.count),
        }

    def _identity(self) -> dict[str, Any]:
        """What another average must have in common to go on from this one's state."""
        return {"kind": type(self).__name__, "copied buffers": list(self.tracked.following)}

    def _check_state(self, saved: Mapping[str, Any]) -> None:
        """Raise `ValueError` for what is no state of such an average."""
        if not saved.keys() >= {"average", "calls", "count", "tensors"}:
            raise ValueError(f"not the state of an average: it has {', '.join(map(str, saved))}")
        check_identity(self._identity(), saved["average"])

    def _all_stored(self, count: int) -> dict[str, Tensor]:
        copied = dict(zip(self.tracked.names_copied(), self._copied, strict=True))
        return self._stored() | self._history(count) | copied

    @torch.no_grad()
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave, in place.

        Options that only say how to go on (as a decay) may be others than those it was saved with.

        Raises `ValueError` for the state of another model or another kind of average, be it one
        that averages other buffers.
        """
        self._check_state(saved)
        mine = self._all_stored(saved["count"])
        check_same(mine, saved["tensors"])
        for name, tensor in mine.items():
            tensor.copy_(saved["tensors"][name])
        self.calls, self.count = saved["calls"], saved["count"]


def check_identity(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Raise `ValueError` with the first thing that differs between two averages."""
    for key, value in mine.items():
        other = theirs.get(key)
        if isinstance(value, list) and isinstance(other, list) and set(value) != set(other):
            name = min(set(value) ^ set(other))
            there, here = ("copied", "averaged") if name in other else ("averaged", "copied")
            raise ValueError(f"the state of another average: {name} is {there} there, {here} here")
        if not isinstance(value, list) and value != other:
            raise ValueError(f"the state of another average: {key}={other} there, {value} here")


def after_steps(
    optimizer: torch.optim.Optimizer,
    model: nn.Module | Named,
    update: Callable[[nn.Module | Named], None],
) -> RemovableHandle:
    """`update(model)` after every step that `optimizer` really takes, until the handle is removed.

    Raises `ValueError` for what is no optimizer or no model.
    """
    if not hasattr(optimizer, "register_step_post_hook"):
        raise ValueError(f"{type(optimizer).__name__} is no optimizer: attach(optimizer, model)")
    if not isinstance(model, nn.Module | Mapping):
        raise ValueError(f"{type(model).__name__} is no model: attach(optimizer, model)")

    def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        skipped = getattr(optimizer, "found_inf", None)  # there while a scaler steps it
        if skipped is None or not skipped.item():
            update(model)

    return optimizer.register_step_post_hook(after)


def write(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy; of an expanded tensor, whose numbers share memory, the one that is there."""
    if any(0 in t.stride() for t in targets):
        targets, sources = list(targets), list(sources)
        for i, target in enumerate(targets):
            for axis, stride in enumerate(target.stride()):
                if stride == 0:
                    targets[i] = targets[i].narrow(axis, 0, min(1, target.shape[axis]))
                    sources[i] = sources[i].narrow(axis, 0, min(1, target.shape[axis]))
    if targets:
        torch._foreach_copy_(targets, sources)


@contextmanager
def _lasting() -> Iterator[None]:
    """Tensors made here may be changed later on, wherever they are made."""
    with torch.inference_mode(False), torch.no_grad():
        yield
