"""Equal to ema-pytorch's EMA over random trajectories."""

from __future__ import annotations

import pytest
from trajectories import assert_same, small_net, walk

from dgavg.averaging import ExponentialMean

peer = pytest.importorskip("ema_pytorch", reason="compared with ema-pytorch: install dgavg[peers]")
RTOL = 1e-4  # theirs computes decays in float32


def pair(model, *, beta: float, after: int, every: int, inv_gamma=1.0, power=2 / 3, min_value=0.0):
    """Theirs, and ours with the same options, where `every` divides `after`.

    Theirs copies up to update number `after`, counted from 0; ours begins there by a copy.
    """
    theirs = peer.EMA(
        model,
        beta=beta,
        update_after_step=after,
        update_every=every,
        inv_gamma=inv_gamma,
        power=power,
        min_value=min_value,
        include_online_model=False,
    )
    ours = ExponentialMean(
        model,
        decay=beta,
        start=after,
        interval=every,
        warmup="power",
        gamma=inv_gamma,
        power=power,
        min_decay=min_value,
        buffers="average",
    )
    return theirs, ours


@pytest.mark.parametrize(("after", "every"), [(0, 1), (0, 3), (10, 1), (10, 5)])
@pytest.mark.parametrize(
    ("inv_gamma", "power", "min_value"), [(1.0, 2 / 3, 0.0), (4.0, 0.75, 0.3), (1.0, 1.0, 0.0)]
)
def test_warm_up_by_power(after, every, inv_gamma, power, min_value):
    model = small_net()
    theirs, ours = pair(
        model,
        beta=0.9,
        after=after,
        every=every,
        inv_gamma=inv_gamma,
        power=power,
        min_value=min_value,
    )
    for step in walk(model):
        theirs.update()
        ours.update(model)
        if step > after:
            weights = theirs.ema_model.state_dict()
            assert_same(ours.weights(), weights, rtol=RTOL, but="num_batches_tracked")
    assert weights["1.num_batches_tracked"] == 1  # as at construction: theirs never copies it
    assert ours.weights()["1.num_batches_tracked"] > 40


def test_buffers_by_name():
    model = small_net()
    follow = {"1.running_mean"}
    theirs = peer.EMA(
        model,
        beta=0.8,
        update_after_step=0,
        update_every=1,
        param_or_buffer_names_no_ema=follow,
        include_online_model=False,
    )
    ours = ExponentialMean(
        model,
        decay=0.8,
        warmup="power",
        buffers=lambda name: "copy" if name in follow else "average",
    )
    for _ in walk(model):
        theirs.update()
        ours.update(model)
        weights = theirs.ema_model.state_dict()
        assert_same(ours.weights(), weights, rtol=RTOL, but="num_batches_tracked")
