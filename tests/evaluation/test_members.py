"""Candidates of several weights, whose predictions are averaged, and probes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dgavg.averaging import recalibrate_batchnorm
from dgavg.evaluation import Scorer, Split
from dgavg.models import Model
from dgavg.trainer import Candidate


def model_of(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8)]
        return Model(nn.Sequential(*layers), nn.Linear(8, 3)).train()


@pytest.fixture
def splits():
    random = torch.Generator().manual_seed(1)
    return {
        name: Split(
            torch.randint(0, 256, (30, 3, 2, 2), generator=random, dtype=torch.uint8),
            torch.randint(3, (30,), generator=random),
        )
        for name in ("a/out", "b/in")
    }


POOL = list(torch.rand(40, 3, 2, 2, generator=torch.Generator().manual_seed(2)).split(15))


@pytest.mark.parametrize("policy", ["average", "recalibrate"])
def test_members_predict_the_mean_of_their_softmaxes(splits, policy):
    members = [model_of(seed) for seed in (1, 2, 3)]
    weights = tuple(dict(m.state_dict()) for m in members)
    candidate = Candidate(weights[0], policy, members=weights)
    found = Scorer(model_of(0), splits, lambda: POOL).score({"several": candidate})["several"]
    for m in members:
        if policy == "recalibrate":
            recalibrate_batchnorm(m, POOL)
        m.eval()
    for name, split in splits.items():
        with torch.no_grad():
            images = split.images.float() / 255
            mean = torch.stack([m(images).double().softmax(dim=1) for m in members]).mean(dim=0)
        assert found[name].accuracy == (mean.argmax(dim=1) == split.labels).double().mean().item()
        expected = F.nll_loss(mean.log(), split.labels).item()
        assert found[name].loss == pytest.approx(expected, rel=1e-5)


def test_a_probe_is_not_scored_on_the_held_out_domain(splits):
    live = model_of(0)
    candidates = {
        "live": Candidate(live.state_dict()),
        "probe": Candidate(model_of(1).state_dict(), "average", probe=True),
    }
    scorer = Scorer(live, splits, lambda: POOL, held_out=frozenset(["b/in"]))
    found = scorer.score(candidates)
    assert list(found["live"]) == ["a/out", "b/in"]
    assert list(found["probe"]) == ["a/out"]
    plain = Scorer(live, splits, lambda: POOL).score(candidates)
    assert found["probe"]["a/out"] == plain["probe"]["a/out"]


def test_instance_norm_with_statistics_is_recalibrated_on_the_twin_alone(splits):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        norm = nn.InstanceNorm2d(3, track_running_stats=True)
        model = Model(nn.Sequential(norm, nn.Flatten()), nn.Linear(12, 3)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    scorer = Scorer(model, splits, lambda: POOL)
    scorer.score({"x": Candidate(dict(model.state_dict()), "recalibrate")})
    means = torch.cat(POOL).mean(dim=(0, 2, 3))
    torch.testing.assert_close(scorer.weights("x")["featurizer.0.running_mean"], means)
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("batch_size", [1, 7, 30, 31, 64])
def test_batches_over_the_borders_of_splits_change_no_score(splits, batch_size):
    live, held_out = model_of(0), frozenset(["a/out"])
    candidates = {"live": Candidate(live.state_dict())}
    whole = Scorer(live, splits, lambda: POOL).score(candidates)["live"]
    found = Scorer(live, splits, lambda: POOL, batch_size=batch_size, held_out=held_out)
    for name, score in found.score(candidates)["live"].items():
        assert (score.accuracy, score.n) == (whole[name].accuracy, whole[name].n)
        assert score.loss == pytest.approx(whole[name].loss, rel=1e-5)


def test_a_second_scoring_borrows_other_weights_and_keeps_the_modes(splits):
    live = model_of(0)
    scorer = Scorer(live, splits, lambda: POOL)
    first = scorer.score({"x": Candidate(model_of(1).state_dict(), "recalibrate")})["x"]
    second = scorer.score({"y": Candidate(model_of(2).state_dict(), "recalibrate")})["y"]
    again = scorer.score({"x": Candidate(model_of(1).state_dict(), "recalibrate")})["x"]
    assert first == again != second
    live.featurizer[2].eval()  # frozen from here on
    frozen = scorer.score({"x": Candidate(model_of(1).state_dict(), "recalibrate")})["x"]
    assert frozen != first
