"""Shadows: averages that leave the run alone, and what they offer."""

from __future__ import annotations

import pytest
import torch
from plain import run_of, trained

from dgavg.averaging import RunningMean
from dgavg.testing import toy_model
from dgavg.testing.contract import same
from dgavg.trainers import SMA, Basic
from dgavg.trainers.weights.shadow import offer


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("shadows", ["sma", "ema", "swa", "ema_swa_sma"])
def test_a_shadow_leaves_weights_and_optimizer_alone_to_the_bit(shadows, optimizer):
    settings = {"sma": {"start": 2}, "ema": {"decay": 0.5}, "swa": {}, "irm": {"anneal": 3}}
    found = []
    for spec in (f"{shadows}_irm_basic", "irm_basic"):
        mine = {k: settings[k] for k in spec.split("_")[:-1]}
        run = trained(spec, mine, optimizer=lambda p: optimizer(p, lr=0.05))
        found.append((run.live, run.optimizer.state_dict()))
    assert same(*found)


def test_shadows_of_one_run_are_those_of_runs_of_their_own():
    settings = {"sma": {"start": 2}, "ema": {"decay": 0.5}, "swa": {}}
    together = trained("ema_swa_sma_basic", settings).candidates()
    assert list(together) == ["live", "ema", "swa", "sma"]
    for name, mine in settings.items():
        alone = trained(f"{name}_basic", {name: mine}).candidates()[name]
        assert same(together[name].weights, alone.weights)


def test_the_average_shares_no_memory_with_the_live_weights():
    run = trained("ema_basic")
    live = {v.data_ptr() for v in run.live.values()}
    assert not live & {v.data_ptr() for v in run.candidates()["ema"].weights.values()}


def test_nothing_is_offered_before_the_first_update():
    model = toy_model()
    average = RunningMean(model)
    link = SMA(Basic(), batchnorm="keep")
    assert offer(link, None) == {}
    assert offer(link, average) == {}
    average.update(model)
    assert offer(link, average)["sma"].batchnorm == "keep"


def test_an_average_of_a_run_holds_no_more_than_one_copy_of_the_weights():
    run = run_of("ema_basic")
    held = next(iter(run.trainer)).average.state_dict()["tensors"]
    assert sum(t.numel() for t in held.values()) == sum(t.numel() for t in run.live.values())
