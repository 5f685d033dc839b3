"""StackedScorer: every candidate of several runs on their own splits, in one pass."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dgavg.averaging.parameters import named_tensors
from dgavg.evaluation.scoring import Found, SplitScore
from dgavg.models.stack import Stack, StackedBatchNorm, StackedMoments, part
from dgavg.trainer import Candidate, Weights

Rows = Mapping[str, Tensor]  # of each split, the rows (n,) of the pool


class StackedScorer:
    """Scores candidates of a `layered` `Stack`, each model of it on splits of its own.

    `images(rows)` and `labels` are those of a pool; `splits` has, of each model, the rows of each
    split; `pooled`, of each model, the rows of the batches that batch norm is recalibrated on.
    `forward(stack, x)` gives logits. Nothing is swapped into the live stack.
    """

    def __init__(
        self,
        model: Stack,
        splits: Sequence[Rows],
        pooled: Sequence[Sequence[Tensor]],
        images: Callable[[Tensor], Tensor],
        labels: Tensor,
        *,
        batch_size: int,
        forward: Callable[[Stack, Tensor], Tensor],
    ) -> None:
        self.model, self.splits, self.images, self.labels = model, splits, images, labels
        self.forward = forward
        self.batch_size = batch_size
        each = [torch.cat(list(found.values())) for found in splits]
        self.rows, self.mask = _side_by_side(each, labels.device)
        names = list(itertools.chain(*splits))
        sizes = [len(rows) for found in splits for rows in found.values()]
        owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        self.owner = torch.full(self.rows.shape, len(names), device=labels.device)
        self.owner[self.mask] = owner.to(labels.device)
        self.sizes = sizes
        none = torch.empty(0, dtype=torch.int64)  # of a model with fewer batches than another
        batches = itertools.zip_longest(*pooled, fillvalue=none)
        self.pooled = [_side_by_side(rows, labels.device) for rows in batches]
        self._twins: dict[str, Stack] = {}

    @torch.no_grad()
    def score(self, candidates: Mapping[str, Candidate]) -> list[dict[str, Found]]:
        """Of each model, scores by candidate and split."""
        self._twins = {k: self._twin(k, c) for k, c in candidates.items()}
        again = [k for k, c in candidates.items() if c.batchnorm == "recalibrate"]
        self._recalibrate([self._twins[k] for k in again])
        with torch.inference_mode():
            sums = self._sums_that_fit()
            found = dict(zip(candidates, sums.tolist(), strict=True))  # the one host sync
        return self._by_model(found)

    def _sums_that_fit(self) -> Tensor:
        """`_sums`, anew by smaller batches where the device has not the memory."""
        while True:
            try:
                return self._sums()
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
                self.batch_size //= 2
            torch.cuda.empty_cache()

    def _sums(self) -> Tensor:
        """Hits and losses (candidates, splits of all models, 2), added up."""
        sums = torch.zeros(len(self._twins), len(self.sizes) + 1, 2, device=self.labels.device)
        for start in range(0, self.rows.shape[1], self.batch_size):
            columns = slice(start, start + self.batch_size)
            rows = self.rows[:, columns].flatten()
            images, labels = self.images(rows), self.labels[rows]
            owner = self.owner[:, columns].flatten()
            for i, twin in enumerate(self._twins.values()):
                logits = self.forward(twin, images)
                loss = F.cross_entropy(logits, labels, reduction="none")
                right = (logits.argmax(dim=1) == labels).to(loss.dtype)
                sums[i].index_add_(0, owner, torch.stack([right, loss], dim=1))
        return sums

    def _by_model(self, sums: Mapping[str, list[list[float]]]) -> list[dict[str, Found]]:
        scores: list[dict[str, Found]] = []
        start = 0
        for splits in self.splits:
            places = {split: start + i for i, split in enumerate(splits)}
            start += len(places)
            scores.append(
                {
                    name: {split: self._score(i, *each[i]) for split, i in places.items()}
                    for name, each in sums.items()
                }
            )
        return scores

    def _score(self, i: int, right: float, loss: float) -> SplitScore:
        n = self.sizes[i]
        return SplitScore(right / n, loss / n, n)

    def weights(self, name: str, r: int) -> Weights:
        """A copy of the weights that `name` of model `r` was last scored with."""
        found = part(named_tensors(self._twins[name]), r)
        return {k: tensor.detach().clone() for k, tensor in found.items()}

    def _twin(self, name: str, candidate: Candidate) -> Stack:
        twin = self._twins[name] if name in self._twins else copy.deepcopy(self.model)
        weights = dict(candidate.weights)
        live = self.model.state_dict()
        for prefix, layer in self.model.named_modules():
            for key in _statistics(layer):
                full = f"{prefix}.{key}"
                if candidate.batchnorm == "keep":
                    weights[full] = live[full]
                elif candidate.batchnorm == "recalibrate":
                    weights[full] = weights[full].clone()
        twin.load_state_dict(weights, assign=True)
        return twin.eval()

    def _recalibrate(self, twins: Sequence[Stack]) -> None:
        for rows, mask in self.pooled if twins else ():
            images = self.images(rows.flatten())
            for twin in twins:
                for layer in _norms(twin):
                    layer.moments = layer.moments or StackedMoments(layer)
                    layer.moments.mask = mask.unsqueeze(2).float()
                self.forward(twin, images)
        for layer in itertools.chain(*map(_norms, twins)):
            assert layer.moments is not None
            layer.moments.write()
            layer.moments = None


def _norms(stack: Stack) -> list[StackedBatchNorm]:
    return [m for m in stack.modules() if isinstance(m, StackedBatchNorm)]


def _statistics(layer: torch.nn.Module) -> list[str]:
    if not isinstance(layer, StackedBatchNorm):
        return []
    return [name for name, _ in layer.named_buffers(recurse=False)]


def _side_by_side(rows: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of each model (R, n), filled up with row 0, and which are the model's own (R, n)."""
    found = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    lengths = torch.tensor([len(each) for each in rows])
    mask = torch.arange(found.shape[1]) < lengths.unsqueeze(1)
    return found.to(device), mask.to(device)
