"""RunningMean against the mean of stored snapshots."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dgavg.averaging import RunningMean


def test_two_thousand_updates_equal_the_mean_of_all_snapshots():
    random = np.random.default_rng(0)
    snapshots = random.normal(1.0, 0.3, size=(2000, 50)).astype(np.float32)
    live = {"w": torch.zeros(50)}
    average = RunningMean(live)
    for snapshot in snapshots:
        live["w"].copy_(torch.from_numpy(snapshot))
        average.update(live)
    exact = snapshots.astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(average.weights()["w"].numpy(), exact, rtol=1e-5)


@pytest.mark.parametrize(
    ("first_count", "shares"),
    [(1, [0.25] * 4), (2, [0.4, 0.2, 0.2, 0.2]), (3, [3 / 6, *[1 / 6] * 3])],
)
def test_the_first_snapshot_counts_as_often_as_asked(first_count, shares):
    live = {"w": torch.zeros(4)}
    average = RunningMean(live, first_count=first_count)
    for row in torch.eye(4):
        live["w"].copy_(row)
        average.update(live)
    assert average.weights()["w"].tolist() == pytest.approx(shares)


def test_a_first_count_below_1_is_refused():
    with pytest.raises(ValueError, match="first_count=0: at least 1"):
        RunningMean({"w": torch.zeros(1)}, first_count=0)
