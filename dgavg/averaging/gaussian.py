"""GaussianPosterior: the mean of the weights and a Gaussian about it, to sample from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dgavg.averaging.average import WeightAverage
from dgavg.averaging.batchnorm import pass_on, recalibrate_batchnorm
from dgavg.averaging.flat import zeros
from dgavg.averaging.lent import lent
from dgavg.averaging.parameters import Named, common, wide
from dgavg.averaging.rows import first_rows
from dgavg.averaging.vector import Layout

CHUNK = 1 << 18  # numbers at a time: what is done with them finds them in a CPU's cache
FAR_CHUNK = 1 << 24  # on other devices, where a call costs more than a pass
SCALINGS = ("paper", "reference", "dicee")
DEVIATION_DTYPES = (None, torch.bfloat16, torch.float16, torch.float32, torch.float64)


class GaussianPosterior(WeightAverage):
    """SWAG: a Gaussian from the weights on the way (Maddox et al. 2019, arXiv 1902.02476).

    Its mean is that of all n weights w taken in, its covariance half the diagonal of their
    population variances (Welford's sums, so none is negative) and half D Dᵀ/(K − 1), where the
    columns of D are the latest K ≤ `rank` deviations w − mean, each from the mean of its time.

    - `rank` (20): deviations kept; 0 for a diagonal covariance alone (SWAG-Diagonal).
    - `var_clamp` (1e-30): the least variance.
    - `deviation_dtype` (that of the mean): `torch.bfloat16` halves the memory of the deviations.

    Averaged buffers have a mean and a variance but are not sampled: a running variance plus noise
    may be negative. A complex number is two real ones. Other options: see `WeightAverage`.

    Memory: 2 + `rank` models in float32 (in float64 if a tensor is), and 1 MiB (64 on a GPU), or
    twice the largest tensor that has gaps in memory or another order of axes than at first.

    Raises `ValueError` for settings out of range.
    """

    _seen: list[Tensor] | None = None  # the live tensors that the steps read
    _steps: list[_Step]

    def __init__(
        self,
        source: nn.Module | Named,
        *,
        rank: int = 20,
        var_clamp: float = 1e-30,
        deviation_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        if rank < 0 or rank % 1 != 0:
            raise ValueError(f"rank={rank}: a number of deviations from 0 on")
        if not 0 <= var_clamp < math.inf:
            raise ValueError(f"var_clamp={var_clamp}: the least variance, a number from 0 on")
        if deviation_dtype not in DEVIATION_DTYPES:
            kinds = ", ".join(map(str, DEVIATION_DTYPES))
            raise ValueError(f"deviation_dtype={deviation_dtype}: choose one of {kinds}")
        self.rank, self.var_clamp, self.deviation_dtype = int(rank), var_clamp, deviation_dtype
        super().__init__(source, **options)
        names = self.tracked.buffers
        self._still = [i for i, name in enumerate(self.tracked.averaged) if name in names]

    def _allocate(self, live: list[Tensor]) -> None:
        self._layout = Layout(live)
        dtype, device = _kind(live, torch.float32), self._place(live)
        size = self._layout.size
        self._mean, self._m2 = zeros([size, size], dtype, device)  # m2: squared deviations, summed
        ring = zeros([self.rank * size], self.deviation_dtype or dtype, device)[0]
        self._ring = ring.view(self.rank, size)

    def _follow(self, live: list[Tensor]) -> None:
        dtype, device = _kind(live, self._mean.dtype), self._place(live)
        self._mean, self._m2 = self._mean.to(device, dtype), self._m2.to(device, dtype)
        self._ring = self._ring.to(device, self.deviation_dtype or dtype)

    def _place(self, live: list[Tensor]) -> torch.device:
        return self.device or (live[0].device if live else torch.device("cpu"))

    def _take(self, live: list[Tensor]) -> None:
        if live is not self._seen:
            self._steps, self._seen = self._plan(live), live
        if self.count == 0:
            self._mean.zero_()
            self._m2.zero_()
        n = self.count + 1
        share = self.count / n
        row = self._ring[self.count % self.rank] if self.rank else None
        for here, mean, m2, newest, delta, places, parts in self._steps:
            torch._foreach_copy_(places, parts)
            torch.sub(newest, mean, out=delta)  # from the one after it is share · delta
            if n == 1:
                mean.copy_(newest)
            else:
                mean.lerp_(newest, 1 / n)  # to the bit the mean that `RunningMean` has
            m2.addcmul_(delta, delta, value=share)
            if row is not None:
                torch.mul(delta, share, out=row[here])

    def _plan(self, live: list[Tensor]) -> list[_Step]:
        """An update in steps that fit the cache."""
        length = CHUNK if self._mean.device.type == "cpu" else FAR_CHUNK
        chunks = self._layout.chunks(live, length // 2)
        size = max((c.stop - c.start for c in chunks), default=0)
        scratch = self._mean.new_empty(2, size)
        found = []
        for chunk in chunks:
            here = slice(chunk.start, chunk.stop)
            newest, delta = scratch[:, : chunk.stop - chunk.start]
            moments = self._mean[here], self._m2[here]
            found.append(_Step(here, *moments, newest, delta, chunk.places(newest), chunk.parts))
        return found

    def _means(self) -> list[Tensor]:
        return self._layout.views(self._mean)

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "rank": self.rank}

    def _stored(self) -> dict[str, Tensor]:
        return self._by_part({"mean": self._mean, "m2": self._m2})

    def _history(self, count: int) -> dict[str, Tensor]:
        rows = first_rows(self._ring, min(count, self.rank))
        return self._by_part({"deviations": rows} if self.rank else {})

    def _by_part(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            f"{part}/{name}": tensor
            for part, flat in parts.items()
            for name, tensor in zip(self.tracked.averaged, self._layout.views(flat), strict=True)
        }

    def __getstate__(self) -> dict[str, Any]:
        """A copy looks for the live tensors itself."""
        return {**self.__dict__, "_seen": None, "_steps": []}

    @property
    def deviations(self) -> int:
        """How many deviations there are by now: K."""
        return min(self.count, self.rank)

    def mean(self) -> dict[str, Tensor]:
        """`weights()`, by the name it has here."""
        return self.weights()

    @torch.no_grad()
    def variance(self) -> dict[str, Tensor]:
        """The population variance of each averaged number, by name, in at least float32.

        That of a complex number is the sum of those of its parts, as in `torch.var`.

        Raises `ValueError` before the first update that counts.
        """
        self.check_started()
        flat = (self._m2 / self.count).clamp_(min=self.var_clamp)
        views = self._layout.views(flat)
        for i in self.tracked.guarded:  # without a mean they are copied: nothing varies
            views[i].nan_to_num_(nan=self.var_clamp, posinf=self.var_clamp)
        found = dict(zip(self.tracked.averaged, views, strict=True))
        for name in found:
            if self.tracked.like[name].is_complex():
                found[name] = found[name].sum(dim=-1)
        names = self.tracked.owner.items()
        return {k: found[v] for k, v in names if v in found and k not in self.tracked.unsaved}

    def sample(
        self,
        scale: float = 1.0,
        *,
        generator: torch.Generator | None = None,
        low_rank: bool = True,
        scaling: str = "paper",
    ) -> dict[str, Tensor]:
        """Weights drawn from the Gaussian, by name, as `load_state_dict` takes them.

        With σ² the variances, K the number of deviations so far and z standard normal:

        - `paper`: mean + √(scale/2)·σ∘z₁ + √(scale/(2(K − 1)))·D z₂; without the second part
          (`low_rank` false, or `rank` 0) SWAG-Diagonal, mean + √scale·σ∘z₁.
        - `reference`, the authors' code: mean + √scale·σ∘z₁ + √(scale/(rank − 1))·D z₂, so with as
          many deviations as `rank` its scale 0.5 is the paper's 1.
        - `dicee`: mean + scale·σ∘z₁ + D z₂/√(K − 1), no Gaussian of the paper's at any scale.

        A denominator is at least 1. `generator` may be on another device than the average: one on
        the CPU draws the same numbers wherever that is; by default the global one of the average's
        device. What is not averaged is copied, averaged buffers have their mean.

        Memory: 1 model, once more where the model is not in float32.

        Raises `ValueError` for a scale below 0 or an unknown scaling, and before the first update
        that counts.
        """
        found = self._sample(scale, generator, low_rank, scaling)
        return {k: v for k, v in found.items() if k not in self.tracked.unsaved}

    def _sample(
        self, scale: float, generator: torch.Generator | None, low_rank: bool, scaling: str
    ) -> dict[str, Tensor]:
        self.check_started()
        drawn = self._layout.views(self._draw(*self._factors(scale, low_rank, scaling), generator))
        means = self._means()
        for i in self._still:
            drawn[i] = means[i].clone()
        return self.tracked.named(drawn, [t.clone() for t in self._copied])

    def _factors(self, scale: float, low_rank: bool, scaling: str) -> tuple[float, float]:
        """Of σ∘z₁ and of D z₂."""
        if not 0 <= scale < math.inf:
            raise ValueError(f"scale={scale}: a number from 0 on")
        if scaling not in SCALINGS:
            raise ValueError(f"scaling={scaling!r}: choose one of {', '.join(SCALINGS)}")
        low_rank = low_rank and self.rank > 0
        others = max(self.deviations - 1, 1)
        if scaling == "paper":
            share = scale / 2 if low_rank else scale
            diagonal, along = math.sqrt(share), math.sqrt(share / others)
        elif scaling == "reference":
            diagonal, along = math.sqrt(scale), math.sqrt(scale / max(self.rank - 1, 1))
        else:
            diagonal, along = scale, 1 / math.sqrt(others)
        return diagonal, along if low_rank else 0.0

    @torch.no_grad()
    def _draw(self, diagonal: float, along: float, generator: torch.Generator | None) -> Tensor:
        """The sample as one vector, drawn in chunks of one size on every device."""
        dtype, device = self._mean.dtype, self._mean.device
        source = device if generator is None else generator.device

        def normal(n: int) -> Tensor:
            return torch.randn(n, generator=generator, dtype=dtype, device=source)

        held = self._ring[: self.deviations if along else 0]
        coefficients = (normal(len(held)) * along).tolist()
        drawn = torch.empty_like(self._mean)
        for i, part in enumerate(torch.split(drawn, CHUNK)):
            here = slice(i * CHUNK, i * CHUNK + len(part))
            torch.div(self._m2[here], self.count, out=part)
            part.clamp_(min=self.var_clamp).sqrt_()
            part.mul_(normal(len(part)).to(device)).mul_(diagonal)
            for coefficient, row in zip(coefficients, held, strict=True):
                part.add_(row[here], alpha=coefficient)
            part.add_(self._mean[here])
        return drawn

    @torch.no_grad()
    def predict(
        self,
        model: nn.Module,
        inputs: Tensor | Mapping[str, Any] | Iterable[Any],
        *,
        samples: int = 30,
        batches: Iterable[Any] | None = None,
        scale: float = 1.0,
        generator: torch.Generator | None = None,
        low_rank: bool = True,
        scaling: str = "paper",
        forward: Callable[[nn.Module, Any], Tensor] | None = None,
    ) -> Tensor:
        """Probabilities (N, classes) of `inputs`: the mean of the softmaxes of samples.

        `inputs` is one batch, as a tensor or mapping, or an iterable of batches, which each sample
        goes through in the same order. With `batches` of training data the batch norm of each
        sample is recalibrated, as the paper does; without them each has the averaged or newest
        running statistics. `forward(model, batch)` gives logits (n, classes); by default batches
        are passed on as by `recalibrate_batchnorm`. The samples are those of as many calls of
        `sample`. The model is in evaluation mode for it and afterwards what it was, come what may:
        its weights, buffers and modes.

        Memory: 2 models, a third where the model is not in float32; the probabilities twice.

        Raises `ValueError` for no samples, no inputs, one batch with its labels (two batches, by
        the form of it), and iterators, which end after one sample; and as `sample` does.
        """
        if samples < 1:
            raise ValueError(f"samples={samples}: at least 1")
        rows = [inputs] if isinstance(inputs, Tensor | Mapping) else inputs
        if _is_labelled(rows):
            raise ValueError("inputs has labels beside the inputs: give these alone, or [(x, y)]")
        for name, given in (("inputs", rows), ("batches", batches)):
            if isinstance(given, Iterator):
                raise ValueError(f"{name} end after one sample: give a list or a DataLoader")
        self.tracked.peek(model)  # is it this model?
        total: list[Tensor] = []
        with lent(model, self.tracked.owner) as fresh:
            for _ in range(samples):
                _write(fresh, self._sample(scale, generator, low_rank, scaling))
                if batches is not None:
                    recalibrate_batchnorm(model, batches, forward=forward)
                found = _probabilities(model, rows, forward or pass_on)
                total = [a + b for a, b in zip(total, found, strict=True)] if total else found
        return torch.cat(total) / samples


class _Step(NamedTuple):
    """A stretch of the vector: its moments, room for weights and deviations, where they are."""

    here: slice
    mean: Tensor
    m2: Tensor
    newest: Tensor
    delta: Tensor
    places: list[Tensor]
    parts: list[Tensor]


def _kind(live: list[Tensor], dtype: torch.dtype) -> torch.dtype:
    """What holds `dtype` and every tensor of `live`."""
    for t in live:
        dtype = common(dtype, wide(t.dtype))
    return dtype


def _probabilities(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Tensor]
) -> list[Tensor]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        found = [forward(model, batch) for batch in batches]
    finally:
        for module, mode in modes:
            module.training = mode
    if not found:
        raise ValueError("no inputs: predictions need at least one batch")
    return [logits.to(wide(logits.dtype)).softmax(dim=1) for logits in found]


def _is_labelled(rows: object) -> bool:
    """Whether it is inputs and a target for each, where a list of batches belongs."""
    if not isinstance(rows, list | tuple) or len(rows) != 2:
        return False
    x, y = rows
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        return False
    return x.dim() > 1 and y.dim() == 1


def _write(fresh: Named, weights: Named) -> None:
    for name, tensor in weights.items():
        fresh[name].copy_(tensor)
