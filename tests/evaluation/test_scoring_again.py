"""Scores that are taken over: exactly where a new scoring would find the same."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from dgavg.evaluation import Scorer, Split
from dgavg.models import Model
from dgavg.trainer import Candidate

HELD_OUT = frozenset(["b/out"])


class Shift(nn.Module):
    """Adds a buffer that is not saved."""

    def __init__(self):
        super().__init__()
        self.register_buffer("by", torch.zeros(12), persistent=False)

    def forward(self, x):
        return x.flatten(1) + self.by


@pytest.fixture
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [Shift(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6)]
        return Model(nn.Sequential(*layers, nn.BatchNorm1d(6)), nn.Linear(6, 3)).train()


@pytest.fixture
def splits():
    draw = torch.Generator().manual_seed(1)
    return {
        name: Split(
            torch.randint(0, 256, (n, 3, 2, 2), generator=draw, dtype=torch.uint8),
            torch.randint(3, (n,), generator=draw),
        )
        for name, n in {"a/out": 40, "b/out": 30}.items()
    }


@pytest.fixture
def candidates(model):
    draw = torch.Generator().manual_seed(3)

    def other():
        return {k: v + 0.2 * torch.rand(v.shape, generator=draw) for k, v in floats(model).items()}

    policies = ("keep", "average", "recalibrate")
    pair = other(), other()
    return {
        "live": Candidate(model.state_dict()),
        **{policy: Candidate(other() | counters(model), policy) for policy in policies},
        "pair": Candidate({}, "recalibrate", tuple(w | counters(model) for w in pair)),
        "probe": Candidate(other() | counters(model), "recalibrate", probe=True),
    }


def floats(model):
    return {k: v for k, v in model.state_dict().items() if v.is_floating_point()}


def counters(model):
    return {k: v.clone() for k, v in model.state_dict().items() if not v.is_floating_point()}


def new_scorer(model, splits, seen=None):
    """A scorer; `seen` gets the twin of every forward pass."""
    images = torch.rand(50, 3, 2, 2, generator=torch.Generator().manual_seed(2))

    def forward(twin, x):
        if seen is not None:
            seen.append(twin)
        return twin(x)

    return Scorer(model, splits, lambda: images.split([30, 20]), forward=forward, held_out=HELD_OUT)


def copied(candidates):
    """Equal tensors in other memory."""
    return {
        name: dataclasses.replace(
            c,
            weights={k: v.clone() for k, v in c.weights.items()},
            members=tuple({k: v.clone() for k, v in m.items()} for m in c.members),
        )
        for name, c in candidates.items()
    }


def weights_of(scorer, candidates):
    return {
        name: {k: v.numpy().tobytes() for k, v in scorer.weights(name).items()}
        for name in candidates
    }


def passes(found, candidates):
    """Forward passes that scoring these needs: one for each batch and member."""
    return sum(
        max(len(candidates[k].members), 1)
        * (2 * (candidates[k].batchnorm == "recalibrate") + 2 - candidates[k].probe)
        for k in found
    )


def test_what_stood_still_is_taken_over_and_nothing_passes_forward(model, splits, candidates):
    seen = []
    scorer = new_scorer(model, splits, seen)
    first = scorer.score(candidates, keep=True)
    weights = weights_of(scorer, candidates)
    assert len(seen) == passes(candidates, candidates)
    seen.clear()
    assert scorer.score(copied(candidates)) == first  # in other memory, as a new average is
    assert not seen
    assert weights_of(scorer, candidates) == weights  # recalibrated statistics too


def test_scores_are_taken_over_by_the_next_call_alone_and_only_if_asked(model, splits, candidates):
    seen = []
    scorer = new_scorer(model, splits, seen)
    for keep, wanted in ((False, True), (True, True), (False, False), (False, True)):
        seen.clear()
        scorer.score(candidates, keep=keep)
        assert bool(seen) == wanted


def test_scores_may_be_kept_for_many_calls(model, splits, candidates):
    seen = []
    scorer = new_scorer(model, splits, seen)
    first = scorer.score(candidates, keep=True)
    weights = weights_of(scorer, candidates)
    seen.clear()
    for _ in range(3):
        assert scorer.score(candidates, keep=True) == first
        assert weights_of(scorer, candidates) == weights
    assert not seen


def _renamed(model, candidates):
    candidates["other"] = candidates.pop("keep")
    return {"other"}


def _weights(model, candidates):
    candidates["keep"].weights["classifier.bias"][0] += 1e-6
    return {"keep"}


def _member(model, candidates):
    candidates["pair"].members[1]["classifier.bias"][0] += 1e-6
    return {"pair"}


def _fewer_members(model, candidates):
    pair = candidates["pair"]
    candidates["pair"] = dataclasses.replace(pair, members=pair.members[:1])
    return {"pair"}


def _statistics_of_an_average(model, candidates):
    candidates["average"].weights["featurizer.2.running_var"][3] *= 2
    return {"average"}


def _live_statistics(model, candidates):
    model.featurizer[2].running_mean[0] += 1
    return {"live", "keep"}


def _live_weights(model, candidates):
    with torch.no_grad():
        model.classifier.weight[0] += 1
    return {"live"}


def _policy(model, candidates):
    candidates["average"] = dataclasses.replace(candidates["average"], batchnorm="recalibrate")
    return {"average"}


def _no_probe(model, candidates):
    candidates["probe"] = dataclasses.replace(candidates["probe"], probe=False)
    return {"probe"}


def _probe_alone(model, candidates):
    candidates["probe"].weights["classifier.bias"][0] += 1e-6
    return {"probe"}


def _unsaved_buffer(model, candidates):
    model.featurizer[0].by += 0.1
    return set(candidates)


def _mode(model, candidates):
    model.featurizer[5].eval()
    return set(candidates)


CHANGES = [
    _renamed,
    _weights,
    _member,
    _fewer_members,
    _statistics_of_an_average,
    _live_statistics,
    _live_weights,
    _policy,
    _no_probe,
    _probe_alone,
    _unsaved_buffer,
    _mode,
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_moved_is_scored_anew_and_it_alone(change, model, splits, candidates):
    seen = []
    scorer = new_scorer(model, splits, seen)
    scorer.score(candidates, keep=True)
    moved = change(model, candidates)
    seen.clear()
    found = scorer.score(candidates)
    if change is not _mode:  # frozen layers take no part in recalibration
        assert len(seen) == passes(moved, candidates)
    weights = weights_of(scorer, candidates)
    whole = new_scorer(model, splits)
    wanted = whole.score(candidates)
    assert list(found) == list(wanted)
    assert found == wanted
    assert weights == weights_of(whole, candidates)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64, torch.bool])
def test_tensors_of_any_dtype_are_told_apart(dtype, splits):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    for kind in (torch.zeros(2, 2).to(dtype), torch.zeros(()).to(dtype)):
        model.register_buffer("more", kind)
        seen = []
        scorer = new_scorer(model, splits, seen)
        weights = {k: v.clone() for k, v in model.state_dict().items()}
        scorer.score({"a": Candidate(weights, "average")}, keep=True)
        seen.clear()
        scorer.score({"a": Candidate(weights, "average")}, keep=True)
        assert not seen
        weights["more"].view(-1)[-1] = 1
        scorer.score({"a": Candidate(weights, "average")})
        assert len(seen) == 2
