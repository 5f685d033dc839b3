"""Equal to timm's ModelEmaV2 and ModelEmaV3 over random trajectories."""

from __future__ import annotations

import pytest
import torch
from trajectories import assert_same, small_net, walk

from dgavg.averaging import ExponentialMean

peer = pytest.importorskip("timm.utils", reason="compared with timm: install dgavg[timm]")


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("exclude_buffers", [True, False])
def test_v3_without_steps_starts_at_construction(exclude_buffers, foreach):
    model = small_net()
    theirs = peer.ModelEmaV3(
        model, decay=0.9, exclude_buffers=exclude_buffers, foreach=foreach, device=None
    )
    ours = ExponentialMean(model, decay=0.9, buffers="copy" if exclude_buffers else "average")
    ours.update(model)
    for _ in walk(model):
        theirs.update(model)
        ours.update(model)
        assert_same(ours.weights(), theirs.module.state_dict())


@pytest.mark.parametrize("after", [0, 7])
@pytest.mark.parametrize("min_decay", [0.0, 0.6])
@pytest.mark.parametrize(("gamma", "power"), [(1.0, 2 / 3), (3.0, 0.75)])
def test_v3_with_warm_up(after, min_decay, gamma, power):
    """Their step counts from 1; up to `update_after_step` + 1 theirs copies."""
    model = small_net()
    theirs = peer.ModelEmaV3(
        model,
        decay=0.9,
        use_warmup=True,
        warmup_gamma=gamma,
        warmup_power=power,
        min_decay=min_decay,
        update_after_step=after,
    )
    ours = ExponentialMean(
        model,
        decay=0.9,
        warmup="power",
        gamma=gamma,
        power=power,
        min_decay=min_decay,
        start=after,
        buffers="average",
    )
    for step in walk(model):
        theirs.update(model, step=step)
        ours.update(model)
        if step > after:
            assert_same(ours.weights(), theirs.module.state_dict())


@pytest.mark.parametrize("after", [0, 7])
def test_v3_with_steps_and_no_warm_up(after):
    model = small_net()
    theirs = peer.ModelEmaV3(model, decay=0.95, update_after_step=after, exclude_buffers=True)
    ours = ExponentialMean(model, decay=0.95, start=after)
    for step in walk(model):
        theirs.update(model, step=step)
        ours.update(model)
        if step > after:
            assert_same(ours.weights(), theirs.module.state_dict())


def test_v3_with_a_float32_shadow_of_bfloat16():
    model = small_net().bfloat16()
    theirs = peer.ModelEmaV3(model, decay=0.99, dtype=torch.float32)
    ours = ExponentialMean(model, decay=0.99, buffers="average")
    ours.update(model)
    for _ in walk(model):
        theirs.update(model)
        ours.update(model)
    shadow = ours.state_dict()["tensors"]
    assert_same({k: shadow[k] for k in theirs.module.state_dict()}, theirs.module.state_dict())


def test_v2_but_for_the_counters_that_theirs_truncates():
    model = small_net()
    theirs = peer.ModelEmaV2(model, decay=0.9)
    ours = ExponentialMean(model, decay=0.9, buffers="average")
    ours.update(model)
    for _ in walk(model):
        theirs.update(model)
        ours.update(model)
        assert_same(ours.weights(), theirs.module.state_dict(), but="num_batches_tracked")
    name = "1.num_batches_tracked"
    assert ours.weights()[name] == model.state_dict()[name] == 51
    assert theirs.module.state_dict()[name] < 51
