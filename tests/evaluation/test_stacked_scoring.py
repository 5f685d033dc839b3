"""StackedScorer against a Scorer for each model, on domains of different sizes."""

from __future__ import annotations

import pytest
import torch

from dgavg.averaging.parameters import named_tensors
from dgavg.benchmark.scored import rows_to_score, splits_to_score
from dgavg.data import Domain, DomainDataset, TrainingBatches, make_splits
from dgavg.data.stacked import Pool
from dgavg.evaluation import Scorer
from dgavg.evaluation.stacked import StackedScorer
from dgavg.models import build_model
from dgavg.models.stack import Stack
from dgavg.trainer import Candidate

CPU, FOLDS = torch.device("cpu"), [(0, 0), (2, 0), (3, 4)]  # held out, seed
PROTOCOL = {"test_split": "in", "selection": "validation"}


@pytest.fixture(scope="module")
def dataset():
    random = torch.Generator().manual_seed(0)

    def domain(name, n):
        images = torch.randint(0, 256, (n, 1, 2, 3), generator=random).to(torch.uint8)
        return Domain(name, images, torch.randint(0, 3, (n,), generator=random))

    sizes = {"a": 15, "b": 17, "c": 19, "d": 21}
    domains = tuple(domain(name, n) for name, n in sizes.items())
    return DomainDataset("toy", domains, ("x", "y", "z"))


def trained_a_little(dataset, seed, batchnorm=True):
    """Weights and running statistics that are a model's own."""
    torch.manual_seed(seed)
    settings = {"width": 8, "batchnorm": batchnorm}
    model = build_model("mlp", dataset.input_shape, 3, **settings).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for _ in range(4):
            model(torch.rand(9, *dataset.input_shape))
    return model


def both(dataset, models, batch_size, every):
    starts = []
    for held_out, seed in FOLDS:
        splits = make_splits(dataset, 0.2, trial_seed=seed)
        train = [i for i in range(4) if i != held_out]
        batches = TrainingBatches(dataset, splits, train, batch_size=4, seed=seed, device="cpu")
        starts.append((held_out, splits, batches))
    pool = Pool(dataset, CPU)
    stacked = StackedScorer(
        Stack(models),
        [rows_to_score(dataset, s, [h], PROTOCOL, every=every) for h, s, _ in starts],
        [[b.places[rows] for rows in b.pooled_rows(batch_size)] for _, _, b in starts],
        pool.images,
        pool.labels,
        batch_size=batch_size,
        forward=lambda twin, x: twin(x),
    )
    alone = [
        Scorer(
            model,
            splits_to_score(dataset, s, [h], PROTOCOL, CPU, every=every),
            lambda b=b: b.pooled(batch_size),
            batch_size=batch_size,
        )
        for model, (h, s, b) in zip(models, starts, strict=True)
    ]
    return stacked, alone


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("batch_size", [5, 16, 100])
def test_scores_and_weights_are_those_of_each_model(dataset, batch_size, every):
    models = [trained_a_little(dataset, seed) for seed in (0, 1, 2)]
    others = [trained_a_little(dataset, seed) for seed in (3, 4, 5)]
    stacked, alone = both(dataset, models, batch_size, every)
    together = stacked.score(candidates(Stack(models), Stack(others)))
    for r, scorer in enumerate(alone):
        expected = scorer.score(candidates(models[r], others[r]))
        assert together[r].keys() == expected.keys()
        for name, splits in expected.items():
            assert list(together[r][name]) == list(splits)
            for split, score in splits.items():
                found = together[r][name][split]
                assert (found.n, found.accuracy) == (score.n, pytest.approx(score.accuracy))
                assert found.loss == pytest.approx(score.loss, rel=1e-4)
            theirs, mine = scorer.weights(name), stacked.weights(name, r)
            assert mine.keys() == theirs.keys()
            for key in theirs:
                torch.testing.assert_close(mine[key], theirs[key], rtol=1e-4, atol=1e-5)


def test_batches_that_do_not_fit_are_scored_in_smaller_ones(dataset):
    models = [trained_a_little(dataset, seed) for seed in (0, 1, 2)]
    stacked, _ = both(dataset, models, 16, every=False)
    whole = stacked.score({"live": Candidate(stacked.model.state_dict())})
    small, _ = both(dataset, models, 16, every=False)
    rows = []

    def forward(twin, x):
        rows.append(len(x))
        if len(x) > 3 * 5:
            raise torch.OutOfMemoryError("no room")
        return twin(x)

    small.forward = forward
    found = small.score({"live": Candidate(stacked.model.state_dict())})
    assert max(rows[2:]) == 3 * 4
    for mine, expected in zip(found, whole, strict=True):
        for split, score in expected["live"].items():
            assert mine["live"][split].accuracy == score.accuracy
            assert mine["live"][split].loss == pytest.approx(score.loss, rel=1e-5)
    small.forward = lambda twin, x: forward(twin, torch.cat([x] * 16))
    with pytest.raises(torch.OutOfMemoryError):
        small.score({"live": Candidate(stacked.model.state_dict())})


def candidates(live, other):
    return {
        "live": Candidate(live.state_dict()),
        **{p: Candidate(other.state_dict(), p) for p in ("keep", "average", "recalibrate")},
    }


def test_nothing_of_the_live_stack_or_of_a_candidate_changes(dataset):
    models = [trained_a_little(dataset, seed) for seed in (0, 1, 2)]
    stacked, _ = both(dataset, models, 16, every=False)
    other = Stack([trained_a_little(dataset, seed) for seed in (3, 4, 5)])
    before = [{k: v.clone() for k, v in named_tensors(m).items()} for m in (stacked.model, other)]
    modes = [m.training for m in stacked.model.modules()]
    for _ in range(2):
        stacked.score(candidates(stacked.model, other))
    for old, model in zip(before, (stacked.model, other), strict=True):
        assert all(v.equal(old[k]) for k, v in named_tensors(model).items())
    assert [m.training for m in stacked.model.modules()] == modes


def test_models_without_batch_norm_have_nothing_to_recalibrate(dataset):
    models = [trained_a_little(dataset, seed, batchnorm=False) for seed in (0, 1, 2)]
    stacked, alone = both(dataset, models, 16, every=False)
    stack = Stack(models)
    found = stacked.score({"x": Candidate(stack.state_dict(), "recalibrate")})
    for r, scorer in enumerate(alone):
        expected = scorer.score({"x": Candidate(models[r].state_dict(), "recalibrate")})
        for split, score in expected["x"].items():
            assert found[r]["x"][split].loss == pytest.approx(score.loss, rel=1e-5)
