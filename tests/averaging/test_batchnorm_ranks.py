"""Recalibration on two gloo processes, against moments of all rows in NumPy float64.

The processes run this file; each writes the statistics it found, by case.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import join, started
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dgavg.averaging.batchnorm import batchnorm_recalibration, recalibrate_batchnorm

SHAPES = {  # case -> batch shapes of each rank
    "equal": [[(8, 3), (8, 3)], [(8, 3), (8, 3)]],
    "unequal": [[(9, 3), (1000, 3), (2, 3)], [(5, 3)]],
    "none": [[(7, 3), (3, 3)], []],
    "images": [[(6, 3, 2, 4)], [(2, 3, 5, 5), (3, 3, 2, 2)]],
    "samples": [[(6, 3, 4)], [(2, 3, 5), (3, 3, 2)]],
    "sync": [[(9, 3), (2, 3)], [(5, 3)]],
    "parallel": [[(9, 3), (20, 3), (2, 3)], [(5, 3)]],
    "far": [[(500, 3), (500, 3)], [(300, 3)]],
    "apart": [[(9, 3), (20, 3)], [(5, 3)]],
    "block": [[(9, 3)], [(5, 3), (4, 3)]],
    "head": [[(9, 3)], [(5, 3)]],
}
LAYERS = {"images": nn.BatchNorm2d, "sync": nn.SyncBatchNorm}


def batches_of(case, rank):
    """Ranks and batches differ widely in mean and scale."""
    shift = 1e4 if case == "far" else 0.0
    scale = 0.1 if case == "far" else 1.0
    random = np.random.default_rng([len(case), rank])
    return [
        torch.from_numpy(
            random.normal(shift + scale * 10 * (rank + i), scale * (1 + i), shape).astype("f")
        )
        for i, shape in enumerate(SHAPES[case][rank])
    ]


class Head(nn.Module):
    """Its second layer sees the rows of rank 0 alone, the third none."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.first, self.never = (nn.BatchNorm1d(n) for n in (3, 3, 5))

    def forward(self, x):
        if torch.distributed.get_rank() == 0:
            self.first(x)
        return self.main(x)


def model_of(case):
    if case == "head":
        return Head()
    if case == "samples":
        kinds = nn.InstanceNorm1d(3, track_running_stats=True), nn.BatchNorm1d(3)
        return nn.Sequential(*kinds)
    kind = LAYERS.get(case, nn.BatchNorm1d)
    return nn.Sequential(kind(3), nn.ReLU(), kind(3))


def found_by(case, rank):
    """The statistics that this rank ends with."""
    model = model_of(case)
    wrapped = DistributedDataParallel(model) if case == "parallel" else model
    if case == "block":
        with batchnorm_recalibration(wrapped):
            for x in batches_of(case, rank):
                wrapped(x)
    else:
        recalibrate_batchnorm(wrapped, batches_of(case, rank), reduce=case != "apart")
    assert case != "parallel" or wrapped.require_forward_param_sync
    return {k: v for k, v in model.state_dict().items() if "running" in k}


def refused():
    try:
        recalibrate_batchnorm(nn.BatchNorm1d(3), [])
    except ValueError as error:
        return str(error)
    return None


def main(rank, folder):
    join(rank, folder)
    found = {case: found_by(case, rank) for case in SHAPES}
    with batchnorm_recalibration(nn.Linear(2, 2)):  # nothing to merge
        pass
    torch.save({"found": found, "refused": refused()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return started(__file__, tmp_path_factory.mktemp("ranks"))


def rows_of(tensors):
    rows = [np.moveaxis(t.double().numpy(), 1, 0).reshape(t.shape[1], -1) for t in tensors]
    return np.concatenate(rows, axis=1)


def pooled(tensors):
    rows = rows_of(tensors)
    return rows.mean(axis=1), rows.var(axis=1, ddof=1)


def by_sample(tensors):
    samples = [s.reshape(3, -1).double().numpy() for t in tensors for s in t]
    means = [s.mean(axis=1) for s in samples]
    variances = [s.var(axis=1, ddof=1) for s in samples]
    return np.mean(means, axis=0), np.mean(variances, axis=0)


def normalised(x):
    """As a fresh batch norm followed by a ReLU gives it in training."""
    x = x.double()
    dims = [d for d in range(x.dim()) if d != 1]
    var, mean = torch.var_mean(x, dim=dims, correction=0, keepdim=True)
    return ((x - mean) / (var + 1e-5).sqrt()).clamp(min=0)


def assert_statistics(found, layer, expected, rtol=1e-6):
    for name, value in zip(("mean", "var"), expected, strict=True):
        mine = found[f"{layer}.running_{name}"].double().numpy()
        np.testing.assert_allclose(mine, value, rtol=rtol)


@pytest.mark.parametrize("case", [c for c in SHAPES if c not in ("apart", "samples", "head")])
def test_every_rank_has_the_moments_of_the_rows_of_all(ranks, case):
    batches = batches_of(case, 0) + batches_of(case, 1)
    for rank in ranks:
        assert_statistics(rank["found"][case], 0, pooled(batches), 1e-5 if case == "far" else 1e-6)


@pytest.mark.parametrize("case", ["unequal", "none", "images", "sync", "parallel", "block"])
def test_each_rank_normalises_by_its_own_batches(ranks, case):
    hidden = [normalised(x) for rank in range(2) for x in batches_of(case, rank)]
    for rank in ranks:
        assert_statistics(rank["found"][case], 2, pooled(hidden), rtol=1e-4)


@pytest.mark.parametrize("case", [c for c in SHAPES if c != "apart"])
def test_ranks_agree_to_the_bit(ranks, case):
    one, other = (rank["found"][case] for rank in ranks)
    assert one.keys() == other.keys()
    assert all(v.equal(other[k]) for k, v in one.items())


def test_instance_norm_takes_the_samples_of_all_ranks(ranks):
    batches = batches_of("samples", 0) + batches_of("samples", 1)
    for rank in ranks:
        assert_statistics(rank["found"]["samples"], 0, by_sample(batches))


def test_without_reduction_each_rank_has_its_own(ranks):
    for i, rank in enumerate(ranks):
        assert_statistics(rank["found"]["apart"], 0, pooled(batches_of("apart", i)))


def test_layers_that_some_ranks_or_none_reach(ranks):
    batches = [batches_of("head", rank) for rank in range(2)]
    for rank in ranks:
        assert_statistics(rank["found"]["head"], "main", pooled(batches[0] + batches[1]))
        assert_statistics(rank["found"]["head"], "first", pooled(batches[0]))
        assert_statistics(rank["found"]["head"], "never", (np.zeros(5), np.ones(5)))


def test_no_batch_on_any_rank_is_refused_on_all(ranks):
    assert {r["refused"] for r in ranks} == {"batch norm was to be recalibrated, but no batch came"}


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
