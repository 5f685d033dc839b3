"""Scorer against a slow plain loop on deep copies of the model."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from dgavg import UserError
from dgavg.averaging import RunningMean, recalibrate_batchnorm
from dgavg.evaluation import Scorer, Split, SplitScore
from dgavg.models import Model
from dgavg.seeding import random_state
from dgavg.trainer import Candidate

BATCH = 8


@pytest.fixture
def model():
    """Batch norm and dropout, statistics that fit random images; in training mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5)]
        deeper = [nn.Linear(8, 6), nn.BatchNorm1d(6, momentum=0.3)]
        model = Model(nn.Sequential(*layers, *deeper), nn.Linear(6, 3)).train()
        for _ in range(5):
            model(torch.rand(16, 3, 2, 2))
    return model


@pytest.fixture
def splits():
    """Splits of 3 × 2 × 2 images whose sizes no batch size divides."""
    random = torch.Generator().manual_seed(1)
    return {
        name: Split(
            torch.randint(0, 256, (n, 3, 2, 2), generator=random, dtype=torch.uint8),
            torch.randint(3, (n,), generator=random),
        )
        for name, n in {"a/out": 11, "b/out": 20, "c/in": 7}.items()
    }


class Pool:
    """Un-augmented training images in unequal batches; counts how often it is read."""

    def __init__(self) -> None:
        images = torch.rand(50, 3, 2, 2, generator=torch.Generator().manual_seed(2))
        self.batches = list(images.split([20, 20, 7, 3]))
        self.passes = self.read = 0

    def __call__(self):
        self.passes += 1
        for batch in self.batches:
            self.read += 1
            yield batch


@pytest.fixture
def pool():
    return Pool()


@pytest.fixture
def candidates(model):
    """Other weights under each policy, beside the live ones."""
    random = torch.Generator().manual_seed(3)

    def other():
        return {
            k: v + 0.2 * torch.rand(v.shape, generator=random) if v.is_floating_point() else v + 3
            for k, v in model.state_dict().items()
        }

    found = {policy: Candidate(other(), policy) for policy in ("keep", "average", "recalibrate")}
    return {
        "live": Candidate(model.state_dict()),
        **found,
        "second": Candidate(other(), "recalibrate"),
    }


def snapshot(model, candidates):
    """All that scoring must leave alone: values, places, modes, flags and hooks."""
    tensors = {f"live/{k}": v for k, v in model.state_dict().items()}
    for name, candidate in candidates.items():
        tensors |= {f"{name}/{k}": v for k, v in candidate.weights.items()}
    return {
        "values": {k: v.detach().numpy().tobytes() for k, v in tensors.items()},
        "places": {k: v.data_ptr() for k, v in tensors.items()},
        "grads": {k: (p.requires_grad, p.grad) for k, p in model.named_parameters()},
        "modules": {
            name: (
                m.training,
                getattr(m, "momentum", None),
                getattr(m, "track_running_stats", None),
            )
            for name, m in model.named_modules()
        },
        "hooks": {name: len(m._forward_pre_hooks) for name, m in model.named_modules()},
    }


def scorer_of(model, splits, pool):
    return Scorer(model, splits, pool, batch_size=BATCH)


def plain_copy(model, candidate, batches):
    """A model of its own with the candidate's weights, batch norm by its policy."""
    twin = copy.deepcopy(model)
    live = {k: v.clone() for k, v in twin.state_dict().items()}
    twin.load_state_dict(candidate.weights)
    if candidate.batchnorm == "keep":
        for name, tensor in twin.state_dict().items():
            if "running" in name or "tracked" in name:
                tensor.copy_(live[name])
    if candidate.batchnorm == "recalibrate":
        recalibrate_batchnorm(twin, batches)
    return twin


@torch.no_grad()
def plain_score(twin, split):
    """Image by image, in NumPy float64."""
    right, loss = 0, 0.0
    for image, label in zip(split.images, split.labels, strict=True):
        logits = twin.eval()(image[None].float() / 255)[0].numpy().astype(np.float64)
        right += int(logits.argmax() == label)
        loss += np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[label]
    n = len(split.labels)
    return SplitScore(right / n, loss / n, n)


def test_scores_are_those_of_a_plain_loop(model, splits, pool, candidates):
    found = scorer_of(model, splits, pool).score(candidates)
    assert list(found) == list(candidates)
    for name, candidate in candidates.items():
        twin = plain_copy(model, candidate, pool.batches)
        assert list(found[name]) == list(splits)
        for split, score in found[name].items():
            expected = plain_score(twin, splits[split])
            assert (score.accuracy, score.n) == (expected.accuracy, expected.n), (name, split)
            assert score.loss == pytest.approx(expected.loss, rel=1e-5), (name, split)


def test_candidates_of_the_test_differ_in_every_policy(model, splits, pool, candidates):
    """Else the comparison above would say nothing about policies."""
    weights = candidates["keep"].weights
    same = {p: Candidate(weights, p) for p in ("keep", "average", "recalibrate")}
    found = scorer_of(model, splits, pool).score(same)
    assert len({round(s["b/out"].loss, 4) for s in found.values()}) == 3


def test_all_candidates_are_scored_in_one_pass_over_the_images(model, splits, pool, candidates):
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    scorer_of(model, splits, pool).score(candidates)
    assert (pool.passes, pool.read) == (1, len(pool.batches))
    recalibrated, rest = seen[: 2 * pool.read], seen[2 * pool.read :]
    assert all(a is b for a, b in zip(recalibrated[::2], recalibrated[1::2], strict=True))
    batches = -(-sum(len(s.labels) for s in splits.values()) // BATCH)  # over splits' borders
    assert len(rest) == batches * len(candidates)
    assert len({id(x) for x in rest}) == batches


def test_no_training_image_is_read_where_nothing_is_recalibrated(model, splits, pool, candidates):
    del candidates["recalibrate"], candidates["second"]
    scorer_of(model, splits, pool).score(candidates)
    assert pool.passes == 0


def test_the_weights_are_those_that_were_scored(model, splits, pool, candidates):
    scorer = scorer_of(model, splits, pool)
    scorer.score(candidates)
    for name, candidate in candidates.items():
        expected = plain_copy(model, candidate, pool.batches).state_dict()
        found = scorer.weights(name)
        assert found.keys() == expected.keys()
        for key, tensor in found.items():
            torch.testing.assert_close(tensor, expected[key], msg=f"{name} {key}")


def test_weights_that_need_no_change_are_borrowed_not_copied(model, splits, pool, candidates):
    scorer = scorer_of(model, splits, pool)
    scorer.score(candidates)
    for name, candidate in candidates.items():
        key = "classifier.weight"
        assert scorer.weights(name)[key].data_ptr() == candidate.weights[key].data_ptr()


def test_scoring_changes_nothing(model, splits, pool, candidates):
    model.featurizer[4].eval()  # modes of several kinds
    before = snapshot(model, candidates)
    scorer = scorer_of(model, splits, pool)
    for _ in range(2):
        scorer.score(candidates)
        assert snapshot(model, candidates) == before


@pytest.mark.parametrize("passes", [1, 3, 9, 15, 20])
def test_an_exception_in_the_middle_changes_nothing(model, splits, pool, candidates, passes):
    """Pass 1 and 3 are of recalibration, the later ones of scoring."""
    left = [passes]

    def fuse(module, inputs):
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("in the middle")

    handle = model.classifier.register_forward_pre_hook(fuse)
    before = snapshot(model, candidates)
    scorer = scorer_of(model, splits, pool)
    with pytest.raises(RuntimeError, match="in the middle"):
        scorer.score(candidates)
    assert snapshot(model, candidates) == before
    handle.remove()
    after = scorer.score(candidates)
    assert after == scorer_of(model, splits, pool).score(candidates)


def test_scores_follow_the_live_weights_and_modes(model, splits, pool, candidates):
    scorer = scorer_of(model, splits, pool)
    first = scorer.score(candidates)
    with torch.no_grad():
        for tensor in (*model.parameters(), model.featurizer[2].running_mean):
            tensor.mul_(-0.5)
    model.featurizer[6].eval()
    second = scorer.score(candidates)
    assert second == scorer_of(model, splits, pool).score(candidates)
    assert second["live"] != first["live"]
    assert second["keep"] != first["keep"]  # its statistics are the live ones
    assert second["average"] == first["average"]
    assert second["recalibrate"] != first["recalibrate"]  # a layer is frozen now


def test_frozen_batch_norm_keeps_the_candidates_statistics(model, splits, pool, candidates):
    model.featurizer[2].eval()
    scorer = scorer_of(model, splits, pool)
    scorer.score(candidates)
    found, given = scorer.weights("recalibrate"), candidates["recalibrate"].weights
    for key in ("running_mean", "running_var"):
        assert found[f"featurizer.2.{key}"].equal(given[f"featurizer.2.{key}"])
        assert not found[f"featurizer.6.{key}"].equal(given[f"featurizer.6.{key}"])


def test_no_training_image_is_read_where_all_batch_norm_is_frozen(model, splits, pool, candidates):
    model.eval()
    scorer_of(model, splits, pool).score(candidates)
    assert pool.passes == 0


def test_no_random_number_is_drawn(model, splits, pool, candidates):
    before = random_state()
    scorer_of(model, splits, pool).score(candidates)
    after = random_state()
    assert after.pop("torch").equal(before.pop("torch"))
    before.pop("cuda"), after.pop("cuda")
    assert after == before


def test_a_layer_under_two_names_follows_the_policy_under_both(splits, pool):
    norm = nn.BatchNorm1d(12)
    model = nn.Sequential(nn.Flatten(), norm, nn.Linear(12, 12), norm, nn.Linear(12, 3)).train()
    other = {k: v + 1 for k, v in model.state_dict().items()}
    scorer = scorer_of(model, splits, pool)
    scorer.score({"keep": Candidate(other, "keep"), "new": Candidate(other, "recalibrate")})
    for name in ("1.running_mean", "3.running_mean"):
        assert scorer.weights("keep")[name].equal(norm.running_mean)
        assert not scorer.weights("new")[name].equal(other[name])


def test_averages_of_a_model_with_a_compiled_part_are_scored_by_plain_names(model, splits, pool):
    weights = RunningMean(model)
    weights.update(model)
    plain = scorer_of(model, splits, pool).score({"a": Candidate(weights.weights(), "average")})
    model.classifier = torch.compile(model.classifier, backend="eager")
    average = RunningMean(model.state_dict())
    average.update(model.state_dict())
    scorer = scorer_of(model, splits, pool)
    assert scorer.score({"a": Candidate(average.weights(), "average")}) == plain
    assert "classifier.weight" in scorer.weights("a")


def test_an_unknown_policy_is_refused(model, splits, pool):
    candidate = {"swa": Candidate(model.state_dict(), "reset")}
    with pytest.raises(UserError, match="candidate 'swa': batch-norm policy 'reset'; choose one"):
        scorer_of(model, splits, pool).score(candidate)


@pytest.mark.parametrize("change", ["missing", "foreign"])
def test_weights_of_another_model_are_refused(model, splits, pool, change):
    weights = dict(model.state_dict())
    if change == "missing":
        del weights["classifier.bias"]
    else:
        weights["classifier.extra"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"classifier\.(bias|extra)"):
        scorer_of(model, splits, pool).score({"a": Candidate(weights)})


def test_no_training_images_are_refused(model, splits, candidates):
    before = snapshot(model, candidates)
    with pytest.raises(ValueError, match="recalibrated, but no batch came"):
        scorer_of(model, splits, list).score(candidates)
    assert snapshot(model, candidates) == before


def test_forward_passes_run_in_the_precision_of_the_run(model, splits, pool, candidates):
    dtypes = set()
    model.classifier.register_forward_hook(lambda module, inputs, out: dtypes.add(out.dtype))

    def forward(twin, images):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return twin(images).float()

    Scorer(model, splits, pool, forward=forward).score(candidates)
    assert dtypes == {torch.bfloat16}


def test_a_model_that_keeps_its_last_activation_is_scored(model, splits, pool):
    model.register_forward_hook(lambda module, inputs, out: setattr(module, "last", out))
    model(splits["a/out"].images.float())
    assert not model.last.is_leaf
    found = scorer_of(model, splits, pool).score({"live": Candidate(model.state_dict())})
    assert set(found["live"]) == set(splits)
