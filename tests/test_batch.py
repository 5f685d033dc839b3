"""Batches by domain."""

from __future__ import annotations

import torch

from dgavg.testing import ToyBatches


def test_a_batch_splits_into_one_of_each_domain_whose_weighted_risks_add_up():
    batch = ToyBatches(3, rows=4)(0)
    parts = batch.split()
    assert [len(p.y) for p in parts] == [4, 4, 4]
    assert [p.d.unique().tolist() for p in parts] == [[0], [1], [2]]
    assert all(torch.equal(p.x, batch.x[4 * i : 4 * i + 4]) for i, p in enumerate(parts))
    assert [p.weights for p in parts] == [None] * 3
    batch.weights = torch.tensor([0.5, 0.3, 0.2])
    weights = torch.cat([p.weights for p in batch.split()])
    torch.testing.assert_close(weights / 3, batch.weights)
