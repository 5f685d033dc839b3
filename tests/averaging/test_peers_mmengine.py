"""Equal to mmengine's averaged models over random trajectories."""

from __future__ import annotations

import pytest
import torch
from trajectories import assert_same, small_net, walk

from dgavg.averaging import AnnealedMean, ExponentialMean, RunningMean, WeightAverage

peer = pytest.importorskip("mmengine.model", reason="compared with mmengine: install dgavg[peers]")


def pair(kind: str, model, interval: int, update_buffers: bool, momentum: float = 0.02):
    """Theirs, and ours with the same options. Both copy at the first update."""
    theirs = {"interval": interval, "update_buffers": update_buffers}
    ours = {"interval": interval, "buffers": "average" if update_buffers else "copy"}
    if kind == "swa":
        return peer.StochasticWeightAverage(model, **theirs), RunningMean(model, **ours)
    if kind == "ema":
        return (
            peer.ExponentialMovingAverage(model, momentum=momentum, **theirs),
            ExponentialMean(model, momentum=momentum, **ours),
        )
    return (
        peer.MomentumAnnealingEMA(model, momentum=momentum, gamma=20, **theirs),
        AnnealedMean(model, momentum=momentum, gamma=20, **ours),
    )


def followed(model, theirs, ours: WeightAverage, interval: int, frozen: str) -> None:
    for step in walk(model):
        theirs.update_parameters(model)
        ours.update(model)
        if (step - 1) % interval == 0:  # in between theirs still copies buffers
            assert_same(ours.weights(), theirs.module.state_dict(), but=frozen)


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("kind", ["swa", "ema", "annealing"])
def test_parameters_averaged_and_buffers_copied(kind, interval):
    model = small_net()
    theirs, ours = pair(kind, model, interval, update_buffers=False)
    followed(model, theirs, ours, interval, frozen="-")


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("kind", ["swa", "ema", "annealing"])
def test_buffers_averaged_but_for_the_counters_that_theirs_freezes(kind, interval):
    model = small_net()
    theirs, ours = pair(kind, model, interval, update_buffers=True)
    followed(model, theirs, ours, interval, frozen="num_batches_tracked")
    name = "1.num_batches_tracked"
    assert ours.weights()[name] == model.state_dict()[name] - (50 - 1) % interval
    assert theirs.module.state_dict()[name] == 2  # as at the first update


def test_the_same_bits_as_their_lerp():
    model = small_net()
    theirs, ours = pair("ema", model, 1, update_buffers=False, momentum=0.0002)
    for _ in walk(model):
        theirs.update_parameters(model)
        ours.update(model)
    for name, tensor in theirs.module.state_dict().items():
        assert torch.equal(ours.weights()[name], tensor), name


def test_their_default_momenta_are_ours():
    model = small_net()
    theirs, ours = peer.MomentumAnnealingEMA(model), AnnealedMean(model)
    followed(model, theirs, ours, 1, frozen="-")
