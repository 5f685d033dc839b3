"""Post-hoc EMA: store a few averages while training, choose how long they remember afterwards.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", arXiv
2312.02696, section 3.1 and appendix C. A power-function average weighs the n-th of N updates by
about n^γ, so it remembers a constant share of training: its `length`, the standard deviation of
those weights as a share of N. Snapshots of averages of a few lengths span, nearly, those of others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dgavg.averaging.average import after_steps
from dgavg.averaging.convex import ConvexMean
from dgavg.averaging.parameters import Named, common
from dgavg.averaging.vector import Layout

LONGEST = 0.2887  # 1/√12 as it is written: the uniform mean, γ = 0
CHUNK = 1 << 16  # numbers summed at a time on a CPU: they stay in its cache
MISFIT = 0.5  # squared, relative; along a random walk such a fit is off by at most a fifth


def power_of(length: float) -> float:
    """The exponent γ ≥ 0 whose average has `length` in (0, 0.2887]; 0.2887 is the uniform mean.

    The root of length² = (γ + 1)/((γ + 2)²(γ + 3)).

    >>> [round(power_of(x), 2) for x in (0.05, 0.10, 0.25)]
    [16.97, 6.94, 0.72]

    Raises `ValueError` for a length outside that.
    """
    if not 0 < length <= LONGEST:
        raise ValueError(f"length={length}: a share of training in (0, {LONGEST}]")
    low, high = 0.0, 1.0 / length  # since length < 1/γ
    for _ in range(100):
        middle = (low + high) / 2
        longer: bool = (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > length**2
        low, high = (middle, high) if longer else (low, middle)
    return low


class PowerMean(ConvexMean):
    """A power-function average of relative `length`: a ← β·a + (1 − β)·w, β = (1 − 1/n)^(γ+1).

    n counts the updates that count, so an `interval` leaves the length as it is. Other options:
    see `WeightAverage`; memory: see `ConvexMean`.
    """

    def __init__(self, source: nn.Module | Named, *, length: float = 0.1, **options: Any) -> None:
        self.length, self.power = length, power_of(length)
        super().__init__(source, **options)

    def rate(self) -> float:
        """1 − β."""
        return 1.0 - math.pow(1.0 - 1.0 / (self.count + 1), self.power + 1.0)

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "length": self.length}


class PostHocMean:
    """Power-function averages of a few `lengths`, and snapshots of them to make others from.

    `update(model)` takes in weights and, every `snapshot_every` updates that count, stores a
    snapshot of each average; `weights(length, at)` gives the average of another length, now or at
    an earlier update, if the snapshots hold it: lengths between those kept and longer ones do well
    now and at a snapshot, and between two snapshots where many have been stored. The more there
    are, the shorter lengths may be. What they don't hold is refused.
    `dtype` stores snapshots in fewer bits (bfloat16 keeps every magnitude, float16 does not).
    `options` are those of `WeightAverage`.

    Memory: 1 model in float32 for each of `lengths`, and 1 in `dtype` for each snapshot of each;
    `weights()` makes 1 more, and one for each of `lengths` where the newest is no snapshot.

    Raises `ValueError` for lengths out of range.
    """

    def __init__(
        self,
        source: nn.Module | Named,
        *,
        lengths: Sequence[float] = (0.05, 0.10),
        snapshot_every: int = 1000,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        if not lengths or len(set(lengths)) < len(lengths):
            raise ValueError(f"lengths={list(lengths)}: at least one, all different")
        if not (1 <= snapshot_every < math.inf and snapshot_every == int(snapshot_every)):
            raise ValueError(f"snapshot_every={snapshot_every}: a number of updates from 1 on")
        self.averages = [PowerMean(source, length=length, **options) for length in lengths]
        self.snapshot_every, self.dtype = int(snapshot_every), dtype
        self._layout = Layout(self.averages[0]._means())
        self.snapshots: list[dict[str, Any]] = []

    @property
    def calls(self) -> int:
        """Updates asked for."""
        return self.averages[0].calls

    @property
    def count(self) -> int:
        """Updates that counted."""
        return self.averages[0].count

    @torch.no_grad()
    def update(self, source: nn.Module | Named) -> None:
        """Take in the weights that `source` has now."""
        before = self.count
        for average in self.averages:
            average.update(source)
        if self.count > before and self.count % self.snapshot_every == 0:
            self.snapshots += [self._snapshot(average) for average in self.averages]

    def _snapshot(self, average: PowerMean) -> dict[str, Any]:
        """The averages as one vector: a checkpoint of many snapshots has few tensors."""
        flat = self._vector(average._means(), self.dtype)
        return {"count": average.count, "power": average.power, "vector": flat}

    def _vector(self, means: list[Tensor], dtype: torch.dtype | None = None) -> Tensor:
        flat = torch.empty(
            self._layout.size,
            dtype=dtype or _widest(means),
            device=means[0].device if means else None,
        )
        for place, mean in zip(self._layout.views(flat), means, strict=True):
            place.copy_(mean)
        return flat

    def coefficients(self, length: float, at: int | None = None) -> list[float]:
        """What each snapshot, then each average as it stands, contributes; they sum to 1.

        The least-squares fit of their weight profiles to that of `length` after `at` updates.

        Raises `ValueError` before the first update, for an `at` that is no update so far, and where
        the fit misses more than half of the squared norm of the profile.
        """
        found, missed = self._fit(length, at)
        if not missed <= MISFIT:
            raise ValueError(self._too_far(length, self.count if at is None else at, missed))
        return found

    def can_make(self, length: float, at: int | None = None) -> bool:
        """Whether `weights(length, at)` would not be refused for a bad fit.

        Raises `ValueError` before the first update and for values out of range.
        """
        return self._fit(length, at)[1] <= MISFIT

    def _fit(self, length: float, at: int | None) -> tuple[list[float], float]:
        self.averages[0].check_started()
        at = self.count if at is None else at
        if not (1 <= at <= self.count and at == int(at)):
            raise ValueError(f"at={at}: an update from 1 to {self.count}")
        return fit([(s["count"], s["power"]) for s in self._sources()], (at, power_of(length)))

    def _too_far(self, length: float, at: int, missed: float) -> str:
        stored = sorted({s["count"] for s in self._sources()})
        below, above = [n for n in stored if n < at], [n for n in stored if n > at]
        kept = ", ".join(str(a.length) for a in self.averages)
        if at in stored:
            advice = f"choose a length nearer to {kept}, or a smaller snapshot_every"
        else:
            near = " or ".join(map(str, [*below[-1:], *above[:1]]))
            advice = f"choose at={near}, the nearest snapshots, or a smaller snapshot_every"
        return f"length={length}, at={at}: the snapshots miss {missed:.0%} of it; {advice}"

    @torch.no_grad()
    def weights(self, length: float, at: int | None = None) -> dict[str, Tensor]:
        """The average of relative `length` after `at` updates (by default all) by name.

        What is copied, such as integers, is that of the newest update. Raises `ValueError` as
        `coefficients` does.
        """
        return self.weights_of([length], at)[0]

    @torch.no_grad()
    def weights_of(
        self, lengths: Sequence[float], at: int | None = None
    ) -> list[dict[str, Tensor]]:
        """`weights` of each of `lengths`, to the bit, but the snapshots are read once for all.

        Raises `ValueError` as `coefficients` does.
        """
        shares = [self.coefficients(length, at) for length in lengths]
        return [self.averages[0]._by_name(sums) for sums in self._sums(shares)]

    @torch.no_grad()
    def copy_to(self, target: nn.Module | Named, length: float, at: int | None = None) -> None:
        """Write the average of `length` after `at` updates into the model, in place; see `weights`.

        Raises `ValueError` as `coefficients` does.
        """
        sums = self._sums([self.coefficients(length, at)])
        self.averages[0]._write(target, sums[0])

    @contextmanager
    def applied_to(self, model: nn.Module, length: float, at: int | None = None) -> Iterator[None]:
        """In this block `model` has the average of `length` after `at` updates.

        Else as `WeightAverage.applied_to`. Raises `ValueError` as `coefficients` does, but before
        the first update that counts the model stays as it is.
        """
        if self.count == 0:
            yield
            return
        shares = self.coefficients(length, at)
        with self.averages[0]._lent(model, lambda: self._sums([shares])[0]):
            yield

    def attach(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> RemovableHandle:
        """`update(model)` after every step really taken; see `WeightAverage.attach`."""
        return after_steps(optimizer, model, self.update)

    def restart(self) -> None:
        """Forget everything averaged so far, and all snapshots."""
        for average in self.averages:
            average.restart()
        self.snapshots = []

    @torch.no_grad()
    def _sums(self, shares: Sequence[Sequence[float]]) -> list[list[Tensor]]:
        """The snapshots and averages times each of `shares`, summed, chunk by chunk."""
        means, sources = self.averages[0]._means(), self._sources()
        vectors = [s["vector"] if "vector" in s else self._vector(s["means"]) for s in sources]
        dtype, device = _widest(means), means[0].device if means else None
        sums = torch.zeros(len(shares), self._layout.size, dtype=dtype, device=device)
        step = CHUNK if sums.device.type == "cpu" else max(self._layout.size, 1)
        for a in range(0, self._layout.size, step):
            totals = sums[:, a : a + step].unbind()
            for i, vector in enumerate(vectors):
                part = vector[a : a + step].to(sums.device, dtype)
                for total, share in zip(totals, shares, strict=True):
                    total.add_(part, alpha=share[i])
        return [
            [t.to(m.device, m.dtype) for t, m in zip(self._layout.views(row), means, strict=True)]
            for row in sums
        ]

    def _sources(self) -> list[dict[str, Any]]:
        """The snapshots, and the averages as they stand unless that is a snapshot already."""
        newest = [{"count": a.count, "power": a.power, "means": a._means()} for a in self.averages]
        stored = bool(self.snapshots) and self.snapshots[-1]["count"] == self.count
        return self.snapshots if stored else [*self.snapshots, *newest]

    def state_dict(self) -> dict[str, Any]:
        """Averages and snapshots, as aliases."""
        return {
            "averages": [average.state_dict() for average in self.averages],
            "snapshots": list(self.snapshots),
        }

    @torch.no_grad()
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises `ValueError` for the state of another model or other lengths.
        """
        if not saved.keys() >= {"averages", "snapshots"}:
            raise ValueError(
                f"not the state of a post-hoc mean: it has {', '.join(map(str, saved))}"
            )
        if len(saved["averages"]) != len(self.averages):
            raise ValueError(
                f"the state has {len(saved['averages'])} averages, not {len(self.averages)}: "
                "give the lengths it was made with"
            )
        for average, state in zip(self.averages, saved["averages"], strict=True):
            average._check_state(state)
        for average, state in zip(self.averages, saved["averages"], strict=True):
            average.load_state_dict(state)
        self.snapshots = [{**s, "vector": s["vector"].clone()} for s in saved["snapshots"]]


Profile = tuple[int, float]  # the updates that an average takes in, and its γ


def fit(profiles: Sequence[Profile], target: Profile) -> tuple[list[float], float]:
    """The least-squares fit of profiles to another: coefficients, scaled to sum to 1, and misfit.

    The misfit is ‖target − Σ cᵢ·profileᵢ‖²/‖target‖².
    """
    found, missed = _fit(tuple(profiles), target)
    return list(found), missed


@lru_cache(maxsize=128)
def _fit(profiles: tuple[Profile, ...], target: Profile) -> tuple[tuple[float, ...], float]:
    a = torch.tensor([[_product(p, q) for q in profiles] for p in profiles]).double()
    b = torch.tensor([_product(p, target) for p in profiles]).double()
    c = torch.linalg.lstsq(a, b[:, None], driver="gelsd").solution[:, 0]
    c = c / c.sum()
    norm = _product(target, target)
    return tuple(c.tolist()), float((norm - 2 * (c @ b) + c @ a @ c) / norm)


def _widest(tensors: Sequence[Tensor]) -> torch.dtype:
    """What holds the numbers of all of them."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = common(dtype, tensor.dtype)
    return dtype


def _product(p: Profile, q: Profile) -> float:
    """The inner product of two weight profiles (updates, γ) as functions of time."""
    (tp, gp), (tq, gq) = p, q
    early, exponent = min(tp, tq) / max(tp, tq), (gq if tp < tq else gp)
    return (gp + 1) * (gq + 1) * math.pow(early, exponent) / ((gp + gq + 1) * max(tp, tq))
