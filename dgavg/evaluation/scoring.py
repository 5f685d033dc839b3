"""Scorer: every candidate on every split, in one pass over the data."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from dgavg.averaging.batchnorm import batchnorm_recalibration, statistics_layers
from dgavg.averaging.parameters import named_tensors, plain_name
from dgavg.errors import require
from dgavg.trainer import POLICIES, Candidate, Weights


@dataclass(frozen=True, eq=False)
class Split:
    """Images and labels to score on.

    Shapes: `images` uint8 (N, C, H, W), `labels` int64 (N,), both on the device of the model.
    """

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class SplitScore:
    """Accuracy in [0, 1] and mean cross-entropy of one candidate on one split of n images."""

    accuracy: float
    loss: float
    n: int


class Scorer:
    """Scores candidates on twins of the model, which borrow their tensors.

    Nothing is ever swapped into the live model, so no exception can leave the wrong weights in
    training. `pooled()` yields the un-augmented training images, in batches that mix all training
    domains, for candidates whose batch norm is recalibrated; they all share one pass over it.
    Probes are not scored on the splits named in `held_out`. Random numbers are neither drawn nor
    seeded.
    """

    def __init__(
        self,
        model: nn.Module,
        splits: Mapping[str, Split],
        pooled: Callable[[], Iterable[Tensor]],
        *,
        batch_size: int = 512,
        forward: Callable[[nn.Module, Tensor], Tensor] = lambda model, images: model(images),
        held_out: frozenset[str] = frozenset(),
    ) -> None:
        self.model, self.splits, self.pooled = model, splits, pooled
        self.batch_size, self.forward, self.held_out = batch_size, forward, held_out
        self._pool: list[nn.Module] = []  # twins made so far, to be lent again
        self._twins: dict[str, list[nn.Module]] = {}

    @torch.no_grad()
    def score(self, candidates: Mapping[str, Candidate]) -> dict[str, dict[str, SplitScore]]:
        """Scores by candidate and split.

        Raises `UserError` for an unknown batch-norm policy.
        """
        places = itertools.count()
        self._twins = twins = {
            name: [
                self._twin(next(places), name, candidate.batchnorm, weights)
                for weights in candidate.members or (candidate.weights,)
            ]
            for name, candidate in candidates.items()
        }
        self._recalibrate(
            [m for k, c in candidates.items() if c.batchnorm == "recalibrate" for m in twins[k]]
        )
        for twin in itertools.chain(*twins.values()):
            twin.eval()
        return self._by_candidate(twins, {k for k, c in candidates.items() if c.probe})

    def weights(self, name: str) -> Weights:
        """The weights that `name` was last scored with, recalibrated statistics included.

        Of several members, the first's.
        """
        return named_tensors(self._twins[name][0])

    def _by_candidate(
        self, twins: Mapping[str, list[nn.Module]], probes: set[str]
    ) -> dict[str, dict[str, SplitScore]]:
        sums: dict[tuple[str, str], Tensor] = {}
        for rows, images, labels in self._batches():
            held_out = not self.held_out.isdisjoint(rows)
            names = [name for name in twins if not (held_out and name in probes)]
            logits = torch.stack([self._prediction(twins[name], images) for name in names])
            right = (logits.argmax(dim=2) == labels).to(logits.dtype)
            wanted = labels.expand(len(names), -1)
            loss = F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")
            each = torch.stack([right, loss], dim=-1)  # (candidates, rows, 2)
            parts = torch.split(each, list(rows.values()), dim=1)
            for split, part in zip(rows, parts, strict=True):
                for name, found in zip(names, part.sum(dim=1), strict=True):
                    key = name, split
                    sums[key] = sums[key] + found if key in sums else found
        values = torch.stack(list(sums.values())).tolist()  # the one host sync
        found_by = dict(zip(sums, values, strict=True))
        scores: dict[str, dict[str, SplitScore]] = {name: {} for name in twins}
        for name, split in itertools.product(twins, self.splits):
            if (name, split) in found_by:
                n = len(self.splits[split].labels)
                right, loss = found_by[name, split]
                scores[name][split] = SplitScore(right / n, loss / n, n)
        return scores

    def _prediction(self, members: list[nn.Module], images: Tensor) -> Tensor:
        """The logits of one model, or the logarithms of the mean probabilities of several."""
        if len(members) == 1:
            return self.forward(members[0], images)
        found = torch.stack([self.forward(m, images).log_softmax(dim=1) for m in members])
        return found.logsumexp(dim=0) - math.log(len(members))

    def _batches(self) -> Iterator[tuple[dict[str, int], Tensor, Tensor]]:
        """Full batches, over the borders of splits: how many rows of which, images, labels.

        The held-out domain has batches of its own.
        """
        for held_out in (False, True):
            left = self.batch_size
            batch: list[tuple[str, Tensor, Tensor]] = []
            for name, split in self.splits.items():
                start = 0 if (name in self.held_out) == held_out else len(split.labels)
                while start < len(split.labels):
                    rows = slice(start, start + left)
                    batch.append((name, split.images[rows], split.labels[rows]))
                    taken = len(batch[-1][2])
                    start, left = start + taken, left - taken
                    if left == 0:
                        yield _joined(batch)
                        batch, left = [], self.batch_size
            if batch:
                yield _joined(batch)

    def _twin(self, place: int, name: str, policy: str, tensors: Weights) -> nn.Module:
        """A module of the model's structure with the given tensors; nothing is copied but the
        statistics that are to be recalibrated."""
        require(
            policy in POLICIES,
            f"candidate {name!r}: batch-norm policy {policy!r}; choose one of "
            + ", ".join(POLICIES),
        )
        if place == len(self._pool):
            self._pool.append(_copy_of(self.model))
        twin = self._pool[place]
        for mine, theirs in zip(twin.modules(), self.model.modules(), strict=True):
            mine.training = theirs.training
            for key in theirs._non_persistent_buffers_set:
                mine._buffers[key] = theirs._buffers[key]
        live = self.model.state_dict()
        names = {plain_name(k): k for k in live}
        weights = {names.get(k, k): v for k, v in named_tensors(tensors).items()}
        statistics = [
            f"{k}.{b}"
            for k, m in self.model.named_modules(remove_duplicate=False)
            if isinstance(m, _NormBase)
            for b, _ in m.named_buffers(recurse=False)
        ]
        if policy == "keep":
            weights |= {k: live[k] for k in statistics}
        elif policy == "recalibrate":
            weights |= {k: weights[k].clone() for k in statistics}
        twin.load_state_dict(weights, assign=True)
        return twin

    def _recalibrate(self, twins: list[nn.Module]) -> None:
        if not twins or not any(m.training for m in statistics_layers(twins[0])):
            return
        with ExitStack() as stack:
            for twin in twins:
                layers = [m for m in statistics_layers(twin) if m.training]  # frozen ones stay
                stack.enter_context(batchnorm_recalibration(twin, layers))
            for images in self.pooled():
                for twin in twins:
                    self.forward(twin, images)


def _joined(
    batch: list[tuple[str, Tensor, Tensor]],
) -> tuple[dict[str, int], Tensor, Tensor]:
    sizes = {name: len(labels) for name, _, labels in batch}
    images, labels = (torch.cat(parts) for parts in list(zip(*batch, strict=True))[1:])
    return sizes, images.float().div_(255), labels


def _copy_of(model: nn.Module) -> nn.Module:
    """A model of the same structure that shares every tensor."""
    held = (vars(m).values() for m in model.modules())  # such as a last activation
    parts = (*model.parameters(), *model.buffers(), *itertools.chain(*held))
    shared = {id(t): t for t in parts if isinstance(t, Tensor)}
    return copy.deepcopy(model, memo=shared)
