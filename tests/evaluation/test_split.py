"""Splits whose images are not copied are scored as those that are."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from dgavg.benchmark.scored import splits_to_score
from dgavg.data import Domain, DomainDataset, make_splits
from dgavg.data.stream import Images
from dgavg.evaluation import Scorer, Split
from dgavg.evaluation.split import joined
from dgavg.trainer import Candidate

CPU = torch.device("cpu")
PROTOCOL = {"test_split": "all", "selection": "validation"}


@pytest.fixture
def data():
    draw = torch.Generator().manual_seed(0)
    domains = tuple(
        Domain(
            name,
            torch.randint(0, 256, (n, 3, 2, 2), generator=draw, dtype=torch.uint8),
            torch.randint(3, (n,), generator=draw),
        )
        for name, n in {"a": 31, "b": 44, "c": 57}.items()
    )
    return DomainDataset("toy", domains, ("x", "y", "z"))


@pytest.fixture
def splits(data):
    def make(resident):
        return splits_to_score(
            data, make_splits(data, 0.2, 0), [1], PROTOCOL, CPU, every=True, resident=resident
        )

    return make


@pytest.fixture
def candidates():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        found = {
            str(i): Candidate({k: torch.randn_like(v) for k, v in model.state_dict().items()})
            for i in range(4)
        }
    return model, {"live": Candidate(model.state_dict()), **found}


def test_what_a_split_holds(data, splits):
    rows = torch.from_numpy(make_splits(data, 0.2, 0).in_[2])
    expected = data.domains[2].images[rows]
    for resident in (True, False):
        split = splits(resident)["c/in"]
        assert split.resident == resident
        assert len(split) == len(rows)
        assert torch.equal(split.images, expected)
        assert torch.equal(split.labels, data.domains[2].labels[rows])
        assert torch.equal(split.take(slice(3, 9)), expected[3:9])
        assert torch.equal(split.take(torch.tensor([5, 1])), expected[[5, 1]])
        batches = list(split.batches(10))
        assert [len(x) for x in batches] == [10, 10, 10, 10, 6]
        assert torch.equal(torch.cat(batches), expected)


def test_scores_are_the_same_to_the_bit(splits, candidates):
    model, wanted = candidates
    held_out = frozenset(["b/in", "b/out"])
    found = [
        Scorer(model, splits(resident), list, batch_size=7, held_out=held_out).score(wanted)
        for resident in (True, False)
    ]
    assert found[0] == found[1]
    assert len(found[0]["live"]) == 6


def test_a_model_with_a_support_reads_batches_of_one_split(splits, candidates):
    model, wanted = candidates
    model.support = 5
    found = [Scorer(model, splits(r), list).score(wanted) for r in (True, False)]
    assert found[0] == found[1]


def test_splits_held_and_not_held_go_together(splits, candidates):
    model, wanted = candidates
    mixed = {k: splits(i % 2 == 0)[k] for i, k in enumerate(splits(True))}
    assert {split.resident for split in mixed.values()} == {True, False}
    assert Scorer(model, mixed, list).score(wanted) == Scorer(model, splits(True), list).score(
        wanted
    )


@pytest.mark.parametrize("resident", [True, False])
def test_all_candidates_share_one_pass_of_loading(splits, candidates, monkeypatch, resident):
    model, wanted = candidates
    loaded, rows_of = [], Images.rows

    def count(self, rows):
        found = rows_of(self, rows)
        loaded.append(len(found))
        return found

    monkeypatch.setattr(Images, "rows", count)
    Scorer(model, splits(resident), list, batch_size=16).score(wanted)
    assert sum(loaded) == 31 + 44 + 57


def test_joined():
    a, b = torch.arange(6).view(3, 2), torch.arange(4).view(2, 2)
    assert joined([a]) is a
    assert torch.equal(joined([a, b, a]), torch.cat([a, b, a]))


def test_a_tensor_will_do():
    images, labels = torch.arange(24).view(2, 3, 2, 2), torch.tensor([0, 1])
    split = Split(images, labels)
    assert split.resident
    assert torch.equal(split.images, images)
    assert split.take(slice(0, 1)).data_ptr() == images.data_ptr()


@pytest.mark.parametrize("resident", [True, False])
def test_what_is_not_held_is_brought_by_a_thread(splits, candidates, monkeypatch, resident):
    model, wanted = candidates
    seen, gather = set(), Scorer._gather

    def watched(self, plan):
        seen.add(threading.current_thread() is threading.main_thread())
        return gather(self, plan)

    monkeypatch.setattr(Scorer, "_gather", watched)
    Scorer(model, splits(resident), list, batch_size=10).score(wanted)
    assert seen == {resident}
