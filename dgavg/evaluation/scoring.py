"""Scorer: every candidate on every split, in one pass over the data."""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from dgavg.averaging.batchnorm import batchnorm_recalibration, statistics_layers
from dgavg.averaging.parameters import named_tensors, plain_names, same_values
from dgavg.data.domains import as_floats
from dgavg.data.stream import ahead
from dgavg.distributed import rank, ranks
from dgavg.errors import require
from dgavg.evaluation.memory import Fitting
from dgavg.evaluation.split import Split as Split
from dgavg.evaluation.split import joined
from dgavg.trainer import POLICIES, Candidate, Weights


@dataclass(frozen=True)
class SplitScore:
    """Accuracy in [0, 1] and mean cross-entropy of one candidate on one split of n images."""

    accuracy: float
    loss: float
    n: int


Found = dict[str, SplitScore]  # by split
Plan = list[tuple[str, slice]]  # the rows of each split that make a batch


class _Kept(NamedTuple):
    """What a candidate was scored on, what that gave, and its running statistics then."""

    digest: bytes
    scores: Found
    statistics: list[dict[str, Tensor]]  # of each member


class Scorer:
    """Scores candidates on twins of the model, which borrow their tensors.

    Nothing is ever swapped into the live model, so no exception can leave the wrong weights in
    training. `pooled()` yields the un-augmented training images, in batches that mix all training
    domains, for candidates whose batch norm is recalibrated; they all share one pass over it.
    Probes are not scored on the splits named in `held_out`. Random numbers are neither drawn nor
    seeded. Batches that the device has not the memory for are scored in parts. Of several processes
    each scores its share of the batches, `pooled` gives each its share of images, and all get the
    same scores.
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
        self._fitting = Fitting()
        self._pool: list[nn.Module] = []  # twins made so far, to be lent again
        self._twins: dict[str, list[nn.Module]] = {}
        self._kept: dict[str, _Kept] = {}

    @torch.no_grad()
    def score(
        self,
        candidates: Mapping[str, Candidate],
        *,
        keep: bool = False,
        tested: Callable[[Mapping[str, Found]], Collection[str]] | None = None,
    ) -> dict[str, Found]:
        """Scores by candidate and split; candidates that are equal are scored once.

        `tested`, where it is given, says by the scores on all other splits which candidates are
        scored on those held out.

        With `keep` the next call takes over what it would find again: the scores of a candidate
        that has the same name, policy, tensors to the bit, and modes. It pays where weights may
        have stood still, and costs a hash of every candidate in both calls.

        Raises `UserError` for an unknown batch-norm policy.
        """
        kept, self._kept = self._kept, {}
        twins = self._twins_of(candidates)
        first = _firsts(candidates, twins)
        self._twins = {k: twins[f] for k, f in first.items()}
        digests = {}
        if keep or kept:
            digests = {f: _digest(candidates[f], twins[f]) for f in first.values()}
        same = {f: kept[f] for f, d in digests.items() if f in kept and kept[f].digest == d}
        for name, before in same.items():
            for twin, statistics in zip(twins[name], before.statistics, strict=True):
                for key, tensor in statistics.items():
                    twin.get_buffer(key).copy_(tensor)
        new = {k: candidates[k] for k, f in first.items() if k == f and k not in same}
        self._recalibrate(
            [m for k, c in new.items() if c.batchnorm == "recalibrate" for m in twins[k]]
        )
        for twin in itertools.chain(*twins.values()):
            twin.eval()
        test = [k for k, c in new.items() if not c.probe]
        mine = {k: twins[k] for k in new}
        if tested is None:
            found = self._by_candidate(mine, test)
        else:
            found = self._by_candidate(mine, ())
            chosen = tested({k: found[f] for k, f in first.items() if f in found})
            test = [k for k in test if any(first[c] == k for c in chosen)]
            rest = self._by_candidate({k: twins[k] for k in test}, test, others=False)
            both = {k: scores | rest.get(k, {}) for k, scores in found.items()}
            found = {k: {s: v[s] for s in self.splits if s in v} for k, v in both.items()}
        found |= {k: before.scores for k, before in same.items()}
        scores = {k: dict(found[f]) for k, f in first.items()}
        if keep:
            self._kept = {
                k: self._keeping(k, candidates[k], digests[f], scores[k]) for k, f in first.items()
            }
        return scores

    def _keeping(self, name: str, candidate: Candidate, digest: bytes, scores: Found) -> _Kept:
        names = _statistics_names(self.model) if candidate.batchnorm == "recalibrate" else []
        statistics = [{k: twin.get_buffer(k) for k in names} for twin in self._twins[name]]
        return _Kept(digest, scores, statistics)

    def weights(self, name: str) -> Weights:
        """The weights that `name` was last scored with, recalibrated statistics included.

        Of several members, the first's.
        """
        return named_tensors(self._twins[name][0])

    def logits(self, name: str, images: Tensor) -> Tensor:
        """What `name` as last scored makes of `images` (N, C, H, W) in [0, 1]: (N, classes)."""
        return self._prediction(self._twins[name], images)

    @torch.inference_mode()
    def _by_candidate(
        self, twins: Mapping[str, list[nn.Module]], tested: Collection[str], *, others: bool = True
    ) -> dict[str, Found]:
        """Scores of all on the splits not held out, if `others`, and of the `tested` on those."""
        names_of = {k: list(tested) if k in self.held_out else list(twins) for k in self.splits}
        if not others:
            names_of = {k: v for k, v in names_of.items() if k in self.held_out}
        sums = {  # all of them, for another process may score what this one does not
            (name, split): torch.zeros(2, device=self.splits[split].labels.device)
            for split, names in names_of.items()
            for name in names
            if len(self.splits[split])
        }
        plans = [plan for plan in self._plans() if names_of.get(plan[0][0])]
        for rows, images, labels in self._batches(plans):
            names = names_of[next(iter(rows))]
            logits = torch.stack([self._prediction(twins[name], images) for name in names])
            right = (logits.argmax(dim=2) == labels).to(logits.dtype)
            targets = labels.expand(len(names), -1)
            loss = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
            each = torch.stack([right, loss], dim=-1)  # (candidates, rows, 2)
            parts = torch.split(each, list(rows.values()), dim=1)
            for split, part in zip(rows, parts, strict=True):
                for name, found in zip(names, part.sum(dim=1), strict=True):
                    sums[name, split] = sums[name, split] + found
        scores: dict[str, Found] = {name: {} for name in twins}
        for (name, split), total in zip(sums, _totals(list(sums.values())), strict=True):
            hits, log_loss = total
            n = len(self.splits[split])
            scores[name][split] = SplitScore(hits / n, log_loss / n, n)
        return scores

    def _prediction(self, members: list[nn.Module], images: Tensor) -> Tensor:
        """The logits of one model, or the logarithms of the mean probabilities of several."""
        if len(members) == 1:
            return self._fitting(self.forward, members[0], images)
        each = [self._fitting(self.forward, m, images) for m in members]
        found = torch.stack([logits.log_softmax(dim=1) for logits in each])
        return found.logsumexp(dim=0) - math.log(len(members))

    def _batches(self, plans: list[Plan]) -> Iterator[tuple[dict[str, int], Tensor, Tensor]]:
        """Images that are not on the device are brought there while the batch before is scored."""
        plans = plans[rank() :: ranks()]
        held = all(split.resident for split in self.splits.values())
        gathered = map(self._gather, plans) if held else ahead(self._gather, plans)
        for plan, images in zip(plans, gathered, strict=True):
            labels = torch.cat([self.splits[name].labels[rows] for name, rows in plan])
            sizes = {name: rows.stop - rows.start for name, rows in plan}
            yield sizes, as_floats(images.to(labels.device, non_blocking=True)), labels

    def _gather(self, plan: Plan) -> Tensor:
        return joined([self.splits[name].gather(rows) for name, rows in plan])

    def _plans(self) -> Iterator[Plan]:
        """Full batches, over the borders of splits: which rows of which splits.

        The held-out domain has batches of its own. A model whose predictions depend on the batch
        says so by `support`, a number of rows: its batches are of one split, so many rows each.
        """
        support = getattr(self.model, "support", None)
        if support is not None:
            for name, split in self.splits.items():
                n = len(split.labels)
                yield from ([(name, slice(i, min(i + support, n)))] for i in range(0, n, support))
            return
        for held_out in (False, True):
            left, batch = self.batch_size, []
            for name, split in self.splits.items():
                n = len(split.labels)
                start = 0 if (name in self.held_out) == held_out else n
                while start < n:
                    rows = slice(start, min(start + left, n))
                    batch.append((name, rows))
                    left -= rows.stop - rows.start
                    start = rows.stop
                    if left == 0:
                        yield batch
                        left, batch = self.batch_size, []
            if batch:
                yield batch

    def _twins_of(self, candidates: Mapping[str, Candidate]) -> dict[str, list[nn.Module]]:
        places = itertools.count()
        live, statistics = self.model.state_dict(), _statistics_names(self.model)
        names = {plain: k for k, plain in plain_names(live).items()}
        found: dict[str, list[nn.Module]] = {}
        for name, candidate in candidates.items():
            policy = candidate.batchnorm
            require(
                policy in POLICIES,
                f"candidate {name!r}: batch-norm policy {policy!r}; choose one of "
                + ", ".join(POLICIES),
            )
            found[name] = []
            for tensors in candidate.members or (candidate.weights,):
                weights = {names.get(k, k): v for k, v in named_tensors(tensors).items()}
                if policy == "keep":
                    weights |= {k: live[k] for k in statistics}
                elif policy == "recalibrate":
                    weights |= {k: weights[k].clone() for k in statistics}
                found[name].append(self._twin(next(places), weights))
        return found

    def _twin(self, place: int, weights: Weights) -> nn.Module:
        """A module of the model's structure that holds the given tensors themselves."""
        if place == len(self._pool):
            self._pool.append(_copy_of(self.model))
        twin = self._pool[place]
        for mine, theirs in zip(twin.modules(), self.model.modules(), strict=True):
            mine.training = theirs.training
            for key in theirs._non_persistent_buffers_set:
                mine._buffers[key] = theirs._buffers[key]
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


def _totals(sums: list[Tensor]) -> list[list[float]]:
    """Sums over the batches of all processes as numbers: the one host sync."""
    if not sums:
        return []
    own = torch.stack(sums)
    if ranks() > 1:
        own = own.double()
        dist.all_reduce(own)
    found: list[list[float]] = own.tolist()
    return found


def _copy_of(model: nn.Module) -> nn.Module:
    """A model of the same structure that shares every tensor."""
    held = (vars(m).values() for m in model.modules())  # such as a last activation
    parts = (*model.parameters(), *model.buffers(), *itertools.chain(*held))
    shared = {id(t): t for t in parts if isinstance(t, Tensor)}
    return copy.deepcopy(model, memo=shared)


def _statistics_names(model: nn.Module) -> list[str]:
    """The names in `state_dict` of what batch-norm layers know of the data, under all of them."""
    return [
        f"{prefix}.{key}" if prefix else key
        for prefix, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, _NormBase)
        for key, _ in module.named_buffers(recurse=False)
    ]


def _firsts(
    candidates: Mapping[str, Candidate], twins: Mapping[str, list[nn.Module]]
) -> dict[str, str]:
    """For each candidate the first one that is scored on the same, which most often is itself."""
    groups: dict[tuple[str, bool, int], list[str]] = {}
    found = {}
    for name, candidate in candidates.items():
        kind = candidate.batchnorm, candidate.probe, len(twins[name])
        alike = groups.setdefault(kind, [])
        found[name] = next((k for k in alike if _are_equal(twins[k], twins[name])), name)
        if found[name] == name:
            alike.append(name)
    return found


def _are_equal(mine: list[nn.Module], theirs: list[nn.Module]) -> bool:
    """Whether twins have the same tensors, laid out alike, for sums depend on that."""
    pairs = zip(_tensors_of(mine), _tensors_of(theirs), strict=True)
    return all(
        a.dtype == b.dtype and a.stride() == b.stride() and same_values(a, b) for a, b in pairs
    )


def _tensors_of(twins: list[nn.Module]) -> Iterator[Tensor]:
    return itertools.chain(*(itertools.chain(t.parameters(), t.buffers()) for t in twins))


def _digest(candidate: Candidate, twins: list[nn.Module]) -> bytes:
    """A hash of all that scores depend on: tensors, unsaved ones too, modes and policy."""
    found = hashlib.sha256(repr((candidate.batchnorm, candidate.probe, len(twins))).encode())
    for twin in twins:
        modes = [module.training for module in twin.modules()]
        tensors = [*twin.named_parameters(), *twin.named_buffers()]
        kinds = [(name, t.dtype, t.shape, t.stride()) for name, t in tensors]
        found.update(repr((modes, kinds)).encode())
        for _, tensor in tensors:
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            found.update(flat.view(torch.uint8).numpy().data)
    return found.digest()
