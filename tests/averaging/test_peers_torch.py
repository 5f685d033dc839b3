"""Equal to torch.optim.swa_utils over random trajectories."""

from __future__ import annotations

import pytest
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_multi_avg_fn,
)
from trajectories import assert_same, small_net, walk

from dgavg.averaging import ExponentialMean, RunningMean

FROZEN = "num_batches_tracked"  # theirs averages it in floating point and truncates


def followed(model, theirs, ours, but="-"):
    """Both copy at the first update."""
    for _ in walk(model):
        theirs.update_parameters(model)
        ours.update(model)
        assert_same(ours.weights(), theirs.module.state_dict(), but=but)


@pytest.mark.parametrize("function", [None, get_swa_multi_avg_fn()])
def test_uniform_mean_with_buffers_copied(function):
    model = small_net()
    followed(model, AveragedModel(model, multi_avg_fn=function), RunningMean(model))


@pytest.mark.parametrize("decay", [0.5, 0.999])
@pytest.mark.parametrize("multi", [True, False])
def test_exponential_mean_with_buffers_copied(decay, multi):
    model = small_net()
    function = (
        {"multi_avg_fn": get_ema_multi_avg_fn(decay)}
        if multi
        else {"avg_fn": get_ema_avg_fn(decay)}
    )
    followed(model, AveragedModel(model, **function), ExponentialMean(model, decay=decay))


def test_uniform_mean_of_buffers():
    model = small_net()
    theirs = AveragedModel(model, use_buffers=True)
    followed(model, theirs, RunningMean(model, buffers="average"), but=FROZEN)


def test_exponential_mean_of_buffers():
    model = small_net()
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    ours = ExponentialMean(model, decay=0.9, buffers="average")
    followed(model, theirs, ours, but=FROZEN)
    assert ours.weights()["1.num_batches_tracked"] == 51
    assert theirs.module.state_dict()["1.num_batches_tracked"] < 51
