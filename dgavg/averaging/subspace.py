"""WeightSubspace: an average whose coefficients are trained, in the span of the last weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dgavg.averaging.average import WeightAverage, write
from dgavg.averaging.parameters import Named, names_of, plain_name, real, same_memory
from dgavg.averaging.samples import Samples

FLOOR = 1e-10  # eigenvalues below this share of the largest are rounding

Gradients = nn.Module | Mapping[str, Tensor | None]
Coefficients = Tensor | Sequence[float]


class WeightSubspace(WeightAverage):
    """The average θ(c) = Σ c_i w_i of the `k` latest weights, with coefficients that are trained.

    Trainable weight averaging (TWA; Li et al. 2023, arXiv 2205.13104). The gradient g of the
    weights has r coordinates P g along an orthonormal basis P (r, D) of the samples' span. P is
    never formed: P = Aᵀ(W − mean) with A (K, r) from the eigenvectors of a K×K Gram matrix.

        subspace = WeightSubspace(model, k=10)
        ...                                        # subspace.update(model) after each epoch
        sgd = SubspaceSGD(subspace, lr=0.1)
        for x, y in batches:
            subspace.copy_to(model)                # at first the mean of the samples
            model.zero_grad()
            loss(model(x), y).backward()           # the gradient AT the average
            sgd.step(model)                        # new coefficients
        subspace.copy_to(model)                    # and now recalibrate batch norm

    The gradient may be of any loss: on training batches, on validation data (TWA-v, which is the
    learned soup of these samples), with penalties.

    - `k` (5): samples kept; while there are fewer, all.
    - `centred` (true): the plane through the samples, with at most K − 1 directions; coefficients
      sum to 1. False: the span through the origin, K directions, as in the authors' code.

    Coefficients stand in the order of the samples, oldest first, and are 1/K after each update.
    Averaged buffers have the mean of the samples whatever the coefficients: these may be negative,
    a variance may not. One sample that is not finite spoils the others. Other options: see
    `WeightAverage`.

    Memory: k models in at least float32; 4 MiB for the basis, a few numbers for steps and for
    `copy_to` (the largest parameter where its memory is laid out otherwise than at first); 1 model
    for `weights()`. Time: the basis is one pass over the samples, so are
    `project` and `copy_to`; an update is one over a model, and every k − 1 updates one over all.

    Raises `ValueError` for a `k` below 1.
    """

    def __init__(
        self,
        source: nn.Module | Named,
        *,
        k: int = 5,
        centred: bool = True,
        **options: Any,
    ) -> None:
        if not (1 <= k < math.inf and k == int(k)):
            raise ValueError(f"k={k}: a number of models from 1 on")
        self.k, self.centred = int(k), centred
        self._coefficients = torch.zeros(self.k, dtype=torch.float64)
        self._basis: Tensor | None = None
        super().__init__(source, **options)

    @property
    def samples(self) -> int:
        """How many samples there are: K."""
        return min(self.count, self.k)

    @property
    def coefficients(self) -> Tensor:
        """The coefficients (K,) in float64 that `weights`, `copy_to` and `applied_to` go by.

        Set them to any numbers. Raises `ValueError` for another number of them.
        """
        return self._coefficients[: self.samples].clone()

    @coefficients.setter
    def coefficients(self, values: Coefficients) -> None:
        self._coefficients[: self.samples] = self._checked(values)

    @torch.no_grad()
    def basis(self) -> Tensor:
        """A, (K, r) in float64: the rows of Aᵀ(W − mean), uncentred of AᵀW, are orthonormal.

        The direction of the largest spread first; none where all samples are equal.

        Raises `ValueError` for samples that are not finite.
        """
        self.check_started()
        if self._basis is None:
            gram = self._samples.products(self.samples, relative=self.centred)
            self._basis = _whitening(gram, self.centred)
        return self._basis

    @torch.no_grad()
    def project(self, gradients: Gradients) -> Tensor:
        """P g, (r,) in float64: the slopes along the directions of the basis.

        `gradients` is a model, for the `.grad` of its parameters, or gradients by name; those
        missing count as 0.

        Raises `ValueError` for names and shapes that the model does not have.
        """
        basis, tensors = self.basis(), self._by_index(gradients)
        return basis.T @ self._samples.dot(tensors, self.samples, relative=self.centred)

    def coefficients_at(self, beta: Coefficients) -> Tensor:
        """The coefficients (K,) of mean + Pᵀβ, with `beta` (r,) along the basis.

        Raises `ValueError` for another number of directions, and as `basis` does.
        """
        basis = self.basis()
        beta = torch.as_tensor(beta, dtype=torch.float64, device="cpu").detach()
        if beta.shape != basis.shape[1:]:
            raise ValueError(
                f"beta is {tuple(beta.shape)}: a number for each of {basis.shape[1]} directions"
            )
        return 1.0 / self.samples + basis @ beta

    @torch.no_grad()
    def projected_mean(self) -> Tensor:
        """P times the mean of the samples, (r,) in float64: where it stands, seen from zero."""
        basis = self.basis()
        return basis.T @ self._samples.products(self.samples, relative=False).mean(dim=1)

    def weights(self, coefficients: Coefficients | None = None) -> dict[str, Tensor]:
        """The average by name, in the model's dtypes; with other coefficients, if you give some.

        Raises `ValueError` before the first update that counts.
        """
        self.check_started()
        return self._by_name(self._mixed(coefficients))

    @torch.no_grad()
    def copy_to(self, target: nn.Module | Named, coefficients: Coefficients | None = None) -> None:
        """Write the average into the model, in place; with other coefficients, if you give some.

        Raises `ValueError` before the first update that counts.
        """
        self.check_started()
        live, copied = self.tracked.peek(target)
        if any(0 in t.stride() for t in live):  # expanded: nothing can be mixed there
            self._write(target, self._mixed(coefficients))
            return
        write(copied, self._copied)
        self._mix(coefficients, live)
        for tensor, finite in zip(live, self.tracked.finite(live, self._copied), strict=True):
            if finite is not tensor:
                tensor.copy_(finite)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave, in place; see `WeightAverage`."""
        super().load_state_dict(saved)
        self._basis = None

    def _allocate(self, live: list[Tensor]) -> None:
        counted = [name not in self.tracked.buffers for name in self.tracked.averaged]
        self._samples = Samples.room_for(self.k, live, self.device, counted)

    def _follow(self, live: list[Tensor]) -> None:
        self._samples = self._samples.moved(live, self.device)

    def _take(self, live: list[Tensor]) -> None:
        self._samples.put(live, self.count)
        n = min(self.count + 1, self.k)
        self._coefficients[:n] = 1.0 / n
        self._basis = None

    def _means(self) -> list[Tensor]:
        return self._mixed(None)

    @torch.no_grad()
    def _mixed(self, coefficients: Coefficients | None) -> list[Tensor]:
        found = [place.like(place.ring) for place in self._samples.places]
        self._mix(coefficients, found)
        return found

    def _mix(self, coefficients: Coefficients | None, targets: list[Tensor]) -> None:
        given = self.coefficients if coefficients is None else self._checked(coefficients)
        self._samples.mix(given, torch.full_like(given, 1.0 / len(given)), targets)

    def _checked(self, values: Coefficients) -> Tensor:
        self.check_started()
        found = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()
        if found.shape != (self.samples,):
            raise ValueError(
                f"coefficients are {tuple(found.shape)}: a number for each of the "
                f"{self.samples} samples"
            )
        return found

    def _by_index(self, gradients: Gradients) -> dict[int, Tensor]:
        """Gradients by the index of the tensor, complex ones as real pairs; tied ones summed."""
        if isinstance(gradients, nn.Module):
            plain = names_of(gradients)
            gradients = {plain[k]: p.grad for k, p in gradients.named_parameters()}
        places = self._samples.places
        index = {k: i for i, k in enumerate(self.tracked.averaged) if places[i].counted}
        found: dict[int, Tensor] = {}
        seen = set()
        for key, gradient in gradients.items():
            name = plain_name(key, self.tracked.owner)
            if name not in self.tracked.owner:
                raise ValueError(f"a gradient of {name}, which the model does not have")
            if gradient is None or self.tracked.owner[name] not in index:
                continue
            if gradient.shape != self.tracked.like[name].shape:
                raise ValueError(
                    f"the gradient of {name} is {tuple(gradient.shape)}, "
                    f"the weights {tuple(self.tracked.like[name].shape)}"
                )
            i = index[self.tracked.owner[name]]
            gradient = gradient.detach()
            gradient = real(
                (gradient.to_dense() if gradient.is_sparse else gradient).resolve_conj()
            )
            if i not in found:
                found[i] = gradient
            elif same_memory(gradient) not in seen:
                found[i] = found[i] + gradient
            seen.add(same_memory(gradient))
        return found

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "k": self.k}

    def _stored(self) -> dict[str, Tensor]:
        return {"subspace/order": self._samples.order, "subspace/coefficients": self._coefficients}

    def _history(self, count: int) -> dict[str, Tensor]:
        rows = self._samples.first(min(count, self.k))
        return {f"samples/{k}": t for k, t in zip(self.tracked.averaged, rows, strict=True)}


def _whitening(gram: Tensor, centred: bool) -> Tensor:
    """A with AᵀGA = 1, G the Gram matrix of the samples, centred on their mean if asked: (K, r)."""
    if not gram.isfinite().all():
        raise ValueError("the samples are not finite: an average of them means nothing")
    if centred:
        gram = gram - gram.mean(dim=0)
        gram = gram - gram.mean(dim=1, keepdim=True)
    values, vectors = torch.linalg.eigh(gram)
    kept = values > FLOOR * values[-1]
    found: Tensor = (vectors[:, kept] / values[kept].sqrt()).flip(1)
    return found - found.mean(dim=0) if centred else found
