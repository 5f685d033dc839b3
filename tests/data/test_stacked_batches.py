"""Batches of several runs at once against those of each run."""

from __future__ import annotations

import pytest
import torch
from stacked_runs import FOLDS

from dgavg.data import Domain, DomainDataset, TrainingBatches, make_splits
from dgavg.data.stacked import Pool, StackedBatches
from dgavg.evaluation.replicas import PoolSplit

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dataset():
    random = torch.Generator().manual_seed(0)

    def domain(name):
        images = torch.randint(0, 256, (15, 3, 8, 8), generator=random).to(torch.uint8)
        return Domain(name, images, torch.randint(0, 3, (15,), generator=random))

    return DomainDataset("toy", tuple(map(domain, "abcd")), ("x", "y", "z"))


@pytest.fixture(params=[True, False])
def resident(request, monkeypatch):
    """Whether the images of all domains fit on the device."""
    if not request.param:
        monkeypatch.setattr("dgavg.data.stream.room", lambda device: 0)
    return request.param


def batches_of(dataset, augment):
    for held_out, seed in FOLDS:
        splits = make_splits(dataset, 0.2, trial_seed=seed)
        train = [i for i in range(4) if i != held_out]
        yield TrainingBatches(
            dataset, splits, train, batch_size=4, seed=seed, device=CPU, augment=augment
        )


@pytest.mark.parametrize("augment", ["none", "domainbed"])
def test_a_batch_holds_those_of_all_runs(dataset, resident, augment):
    each = list(batches_of(dataset, augment))
    stacked = StackedBatches(dataset, list(batches_of(dataset, augment)), "pqr", CPU)
    assert stacked.pool.kept.resident == resident
    for t in (0, 1, 70, 3):
        batch, alone = stacked(t), [one(t) for one in each]
        assert batch.x.equal(torch.cat([one.x for one in alone]))
        assert batch.y.equal(torch.cat([one.y for one in alone]))
        assert batch.d.equal(torch.cat([one.d + 3 * r for r, one in enumerate(alone)]))


def test_a_split_of_the_pool_has_its_rows(dataset, resident):
    rows = torch.tensor([3, 17, 16, 59])
    split = PoolSplit(Pool(dataset, CPU), rows)
    images = torch.cat([domain.images for domain in dataset.domains])
    labels = torch.cat([domain.labels for domain in dataset.domains])
    assert split.resident == resident
    assert split.images.equal(images[rows])
    assert split.labels.equal(labels[rows])
    assert split.gather(slice(1, 3)).equal(images[rows[1:3]])
    assert split.take(torch.tensor([2, 0])).equal(images[rows[[2, 0]]])
