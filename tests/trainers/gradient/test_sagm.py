"""SAGM against two explicit gradients on a deep copy."""

from __future__ import annotations

import copy

import pytest
import torch
from plain import assert_weights, erm, plain_training, run_of, trained

from dgavg import UserError, chain
from dgavg.testing.contract import same


def sagm_gradient(rho, alpha):
    def gradient(model, batch, t):
        twin = copy.deepcopy(model)
        erm(model, batch, t).backward()
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        with torch.no_grad():
            for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
                mine += (rho / norm - alpha) * theirs.grad
        twin.zero_grad()
        erm(twin, batch, t).backward()
        for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
            theirs.grad = 0.5 * theirs.grad + 0.5 * mine.grad

    return gradient


@pytest.mark.parametrize(("rho", "alpha"), [(0.5, 0.001), (0.3, 0.5), (0.0, 0.4)])
def test_training_steps_with_the_mean_of_both_gradients(rho, alpha):
    run = trained("sagm_basic", {"sagm": {"rho": rho, "alpha": alpha}})
    assert_weights(run.live, plain_training(gradient=sagm_gradient(rho, alpha)).state_dict())
    basic = trained("basic").live["classifier.weight"]
    assert (run.live["classifier.weight"] - basic).abs().max() > 1e-3


def test_the_two_gradients_are_weighed_evenly():
    """Without the step back, it is half way between basic and SAM."""
    found = []
    settings = {"sagm": {"rho": 0.5, "alpha": 0.0}, "sam": {"rho": 0.5}}
    for spec in ("basic", "sam_basic", "sagm_basic"):
        run = run_of(spec, {k: v for k, v in settings.items() if k in spec})
        run.grad(run.batches(0))
        found.append(torch.cat([p.grad.flatten() for p in run.parameters]))
    torch.testing.assert_close(found[2], (found[0] + found[1]) / 2)


def test_switched_off_it_is_basic_to_the_bit():
    off = {"sagm": {"rho": 0.0, "alpha": 0.0}}
    assert same(trained("sagm_basic", off).live, trained("basic").live)


def test_weights_statistics_and_loss_are_those_of_the_first_pass_of_sagm():
    run, basic = run_of("sagm_basic", {"sagm": {"rho": 2.0}}), run_of("basic")
    weights = {k: v.clone() for k, v in run.model.named_parameters()}
    losses = [each.grad(each.batches(0)).total for each in (run, basic)]
    assert losses[0].equal(losses[1])
    assert all(v.equal(weights[k]) for k, v in run.model.named_parameters())
    assert all(run.live[k].equal(basic.live[k]) for k in run.buffer_names)


@pytest.mark.parametrize("name", ["rho", "alpha"])
def test_negative_settings_of_sagm_are_refused(name):
    with pytest.raises(UserError, match=rf"trainer.sagm.{name}=-0.1: a number from 0 on"):
        chain("sagm_basic", sagm={name: -0.1})
