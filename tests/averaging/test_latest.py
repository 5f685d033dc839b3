"""LatestMean against the mean of the last stored snapshots."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from trajectories import assert_same, small_net, snapshot, walk

from dgavg.averaging import LatestMean


@pytest.mark.parametrize("k", [1, 2, 5, 30])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_it_is_the_mean_of_the_k_newest(k, dtype):
    snapshots = np.random.default_rng(0).normal(size=(20, 7)).astype(dtype)
    live = {"w": torch.zeros(7, dtype=torch.from_numpy(snapshots).dtype)}
    average = LatestMean(live, k=k)
    for i, row in enumerate(snapshots):
        live["w"].copy_(torch.from_numpy(row))
        average.update(live)
        exact = snapshots[max(0, i + 1 - k) : i + 1].astype(np.float64).mean(axis=0)
        rtol = 1e-5 if dtype == np.float32 else 1e-12
        np.testing.assert_allclose(average.weights()["w"].numpy(), exact, rtol=rtol, atol=rtol)


def test_start_and_interval_choose_which_are_kept():
    live = {"w": torch.zeros(1)}
    average = LatestMean(live, k=2, start=3, interval=4)
    for value in range(16):
        live["w"].fill_(value)
        average.update(live)
    assert average.weights()["w"].item() == (11 + 15) / 2
    assert (average.calls, average.count) == (16, 4)


def test_a_large_weight_that_has_gone_leaves_no_rounding_behind():
    """A sum from which the oldest is taken away would be off by what rounding lost."""
    live = {"w": torch.zeros(1)}
    average = LatestMean(live, k=2)
    for value in (1e8, 0.1, 0.3):
        live["w"].fill_(value)
        average.update(live)
    assert average.weights()["w"].item() == pytest.approx(0.2, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64])
def test_narrow_and_complex_weights(dtype):
    model = torch.nn.Linear(5, 5, dtype=dtype)
    average, seen = LatestMean(model, k=3), []
    for _ in walk(model, 5):
        average.update(model)
        seen.append(snapshot(model)["weight"].to(torch.complex128))
    found = average.weights()["weight"]
    mean = torch.stack(seen[-3:]).mean(dim=0)
    expected = (mean if dtype.is_complex else mean.real).to(dtype)
    torch.testing.assert_close(found, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5,
                               atol=1e-5)  # fmt: skip
    assert {t.dtype for t in average.state_dict()["tensors"].values()} <= {
        torch.bfloat16,
        torch.float32,
    }


def test_it_goes_on_from_its_saved_state():
    model = small_net()
    straight = LatestMean(model, k=3)
    for _ in walk(model, 4):
        straight.update(model)
    resumed = LatestMean(small_net(1), k=3)
    resumed.load_state_dict(straight.state_dict())
    for _ in walk(model, 2):
        straight.update(model)
        resumed.update(model)
        assert_same(resumed.weights(), straight.weights(), rtol=0)


def test_the_state_of_another_k_is_refused():
    model = small_net()
    with pytest.raises(ValueError, match="another average: k=2 there, 3 here"):
        LatestMean(model, k=3).load_state_dict(LatestMean(model, k=2).state_dict())


@pytest.mark.parametrize("k", [0, -1, 1.5, float("inf")])
def test_a_k_that_is_no_number_of_models_is_refused(k):
    with pytest.raises(ValueError, match=rf"k={k}: a number of models from 1 on"):
        LatestMean({"w": torch.zeros(1)}, k=k)


def test_what_was_kept_follows_a_model_to_a_wider_dtype():
    model = torch.nn.Linear(3, 3, dtype=torch.bfloat16)
    average = LatestMean(model, k=2)
    average.update(model)
    kept = model.weight.detach().float()
    model.float()
    with torch.no_grad():
        model.weight.add_(1e-4)
    average.update(model)
    expected = kept.lerp(model.weight.detach(), 0.5)
    assert average.weights()["weight"].equal(expected)
    assert average.state_dict()["tensors"]["latest/weight"].dtype == torch.float32
