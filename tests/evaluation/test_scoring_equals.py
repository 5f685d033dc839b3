"""Candidates that are equal are scored once, and the record has all of them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from dgavg.evaluation import Scorer, Split
from dgavg.models import Model
from dgavg.trainer import Candidate

POLICIES = ("keep", "average", "recalibrate")
HELD_OUT = frozenset(["b/out"])


@pytest.fixture
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU()]
        model = Model(nn.Sequential(*layers), nn.Linear(8, 3))
        model.register_buffer("kind", torch.ones(2, dtype=torch.float64))
        return model.train()


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


def other(model, seed=3):
    draw = torch.Generator().manual_seed(seed)
    return {
        k: v + 0.2 * torch.rand(v.shape, generator=draw) if v.is_floating_point() else v.clone()
        for k, v in model.state_dict().items()
    }


def copied(weights):
    return {k: v.clone() for k, v in weights.items()}


class Counting:
    """A scorer that knows which twins went forward."""

    def __init__(self, model, splits):
        images = torch.rand(50, 3, 2, 2, generator=torch.Generator().manual_seed(2))
        self.seen = []

        def forward(twin, x):
            self.seen.append(twin)
            return twin(x)

        self.scorer = Scorer(
            model, splits, lambda: images.split([30, 20]), forward=forward, held_out=HELD_OUT
        )

    def __call__(self, candidates, **options):
        """Scores, the weights scored with as bytes, and how many twins went forward."""
        self.seen.clear()
        found = self.scorer.score(candidates, **options)
        weights = {
            name: {k: v.numpy().tobytes() for k, v in self.scorer.weights(name).items()}
            for name in candidates
        }
        return found, weights, len({id(twin) for twin in self.seen})


def alone(model, splits, candidates):
    """As each candidate has a scorer of its own."""
    each = {k: Counting(model, splits)({k: c}) for k, c in candidates.items()}
    return {k: v[0][k] for k, v in each.items()}, {k: v[1][k] for k, v in each.items()}


@pytest.mark.parametrize("policy", POLICIES)
def test_equal_candidates_go_forward_once(policy, model, splits):
    weights = other(model)
    candidates = {
        "live": Candidate(model.state_dict()),
        "one": Candidate(weights, policy),
        "between": Candidate(other(model, 4), policy),
        "same": Candidate(copied(weights), policy),
        "again": Candidate(weights, policy),
    }
    found, scored, forward = Counting(model, splits)(candidates)
    assert forward == 3
    assert list(found) == list(candidates)
    assert list(found["same"]) == list(splits)
    assert (found, scored) == alone(model, splits, candidates)
    assert found["same"] is not found["one"]


def test_members_that_are_all_equal_go_forward_once(model, splits):
    members = other(model), other(model, 4)
    turned, fewer = members[::-1], members[:1]
    candidates = {
        name: Candidate({}, "recalibrate", tuple(map(copied, m)))
        for name, m in {"a": members, "b": members, "turned": turned, "fewer": fewer}.items()
    }
    found, scored, forward = Counting(model, splits)(candidates)
    assert forward == 2 + 2 + 1
    assert (found, scored) == alone(model, splits, candidates)


def _policy(weights):
    return Candidate(weights, "recalibrate")


def _probe(weights):
    return Candidate(weights, "average", probe=True)


def _first(weights):
    weights["featurizer.0.weight"][0, 0, 0, 0] += 1e-6
    return Candidate(weights, "average")


def _last(weights):
    weights["kind"][1] = 2
    return Candidate(weights, "average")


def _statistics(weights):
    weights["featurizer.3.running_var"][0] *= 2
    return Candidate(weights, "average")


def _dtype(weights):
    weights["kind"] = weights["kind"].float()
    return Candidate(weights, "average")


def _order(weights):
    weights["featurizer.0.weight"] = weights["featurizer.0.weight"].to(
        memory_format=torch.channels_last
    )
    return Candidate(weights, "average")


def _nan(weights):
    weights["classifier.bias"][0] = float("nan")
    return Candidate(weights, "average")


@pytest.mark.parametrize(
    "change", [_policy, _probe, _first, _last, _statistics, _dtype, _order, _nan]
)
def test_what_differs_at_all_goes_forward_itself(change, model, splits):
    weights = other(model)
    candidates = {"one": Candidate(weights, "average"), "other": change(copied(weights))}
    found, scored, forward = Counting(model, splits)(candidates)
    assert forward == 2
    assert repr((found, scored)) == repr(alone(model, splits, candidates))
    if change is _probe:
        assert list(found["one"]) == ["a/out", "b/out"]
        assert list(found["other"]) == ["a/out"]


@pytest.mark.parametrize("policy", ["keep", "recalibrate"])
def test_what_the_policy_replaces_makes_no_difference(policy, model, splits):
    """Running statistics of the candidate's own, under a policy that has others."""
    weights = other(model)
    twin = copied(weights)
    twin["featurizer.3.running_var"] *= 2
    candidates = {"one": Candidate(weights, policy), "other": Candidate(twin, policy)}
    found, scored, forward = Counting(model, splits)(candidates)
    assert forward == (1 if policy == "keep" else 2)  # under the other they differ until then
    assert (found, scored) == alone(model, splits, candidates)


def test_what_is_taken_over_knows_of_equals(model, splits):
    """Those that part, those that meet, and those that stay equal in the next call."""
    a, b = other(model), other(model, 4)
    first = {k: Candidate(copied(w), "recalibrate") for k, w in {"x": a, "y": a, "z": b}.items()}
    for then in ({"x": a, "y": a, "z": b}, {"x": a, "y": b, "z": b}, {"x": b, "y": a, "z": a}):
        count = Counting(model, splits)
        assert count(first, keep=True)[2] == 2
        second = {k: dataclasses.replace(first[k], weights=copied(w)) for k, w in then.items()}
        found, scored, forward = count(second)
        assert (found, scored) == alone(model, splits, second)
        assert forward <= (0 if then["x"] is a and then["y"] is a else 2)


def test_an_equal_candidate_is_kept_under_its_own_name(model, splits):
    weights, count = other(model), Counting(model, splits)
    candidate = Candidate(weights, "recalibrate")
    found = count({"x": candidate, "y": candidate}, keep=True)
    alone = count({"y": candidate})
    assert alone[2] == 0
    assert alone[0]["y"] == found[0]["y"]
    assert alone[1]["y"] == found[1]["y"]
