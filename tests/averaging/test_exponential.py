"""ExponentialMean against its recursion on stored snapshots."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dgavg.averaging import ExponentialMean


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_many_updates_equal_the_recursion_in_float64(decay):
    snapshots = np.random.default_rng(0).normal(size=(1000, 20)).astype(np.float32)
    live = {"w": torch.zeros(20)}
    average = ExponentialMean(live, decay=decay)
    exact = snapshots[0].astype(np.float64)
    for i, snapshot in enumerate(snapshots):
        live["w"].copy_(torch.from_numpy(snapshot))
        average.update(live)
        if i > 0:
            exact = decay * exact + (1 - decay) * snapshot
    np.testing.assert_allclose(average.weights()["w"].numpy(), exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match=rf"decay={decay}: a number in \[0, 1\)"):
        ExponentialMean({"w": torch.zeros(1)}, decay=decay)
