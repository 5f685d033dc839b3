"""DIAL against a plain search for adversarial images."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from plain import assert_weights, erm, mean, plain_training, risks_of, run_of, trained

from dgavg import UserError, chain
from dgavg.seeding import random_state
from dgavg.testing import check_link, toy_model

FAR = {"weight": 0.8, "steps": 4, "step_size": 0.15, "epsilon": 0.4, "noise": 0.0}


def plain_search(model, x, y, *, steps, step_size, epsilon, start=None):
    """Signs of the slope of cross-entropy plus KL divergence, pixel by pixel put back."""
    natural = model.classifier(model.featurizer(x)).detach()
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 1.0)
    found = x.clone() if start is None else start.clone()
    for _ in range(steps):
        found = found.detach().requires_grad_()
        logits = model.classifier(model.featurizer(found))
        height = F.cross_entropy(logits, y) + F.kl_div(
            logits.log_softmax(1), natural.softmax(1), reduction="batchmean"
        )
        slope = torch.autograd.grad(height, found)[0]
        found = found.detach() + step_size * slope.sign()
        found = torch.min(torch.max(found, x - epsilon), x + epsilon)
        found = found.clamp(low, high)
    return found.detach()


def passes(run, batch):
    """The loss, and the images of every forward pass that it took."""
    seen = []
    hook = run.model.featurizer.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].detach().clone())
    )
    out = run.loss(batch)
    hook.remove()
    return out, seen


def wide(soft=False, t=0):
    run = run_of("dial_basic", {"dial": FAR}, model=toy_model().double())
    batch = run.batches(t)
    batch.x = batch.x.double()
    if soft:
        batch.y = F.one_hot(batch.y, 3).double() * 0.7 + 0.1
    return run, batch


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("t", range(4))
def test_the_images_are_those_of_a_plain_search(t, soft):
    run, batch = wide(soft, t)
    _, seen = passes(run, batch)
    search = {k: FAR[k] for k in ("steps", "step_size", "epsilon")}
    found = plain_search(run.model, batch.x, batch.y, **search)
    torch.testing.assert_close(seen[-1], found)
    moved = (found - batch.x).abs()
    assert moved.max() == pytest.approx(0.4)
    assert (moved > 0.3).double().mean() > 0.5


@pytest.mark.parametrize("soft", [False, True])
def test_the_term_and_its_gradient_are_the_cross_entropy_of_those_images(soft):
    run, batch = wide(soft)
    out, seen = passes(run, batch)
    logits = run.model.classifier(run.model.featurizer(seen[-1]))
    expected = 0.8 * mean(risks_of(logits, batch))
    torch.testing.assert_close(out.terms["dial"].double(), expected, rtol=1e-6, atol=1e-6)
    for p in run.parameters:
        mine, theirs = (
            torch.autograd.grad(value, p, retain_graph=True)[0]
            for value in (out.terms["dial"], expected)
        )
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_training_adds_the_weighted_loss_on_adversarial_images():
    def gradient(model, batch, t):
        natural = erm(model, batch, t)
        kept = {k: v.clone() for k, v in model.named_buffers()}
        search = {k: FAR[k] for k in ("steps", "step_size", "epsilon")}
        found = plain_search(model, batch.x.double(), batch.y, **search)
        (natural + 0.8 * erm(model, replace(batch, x=found), t)).backward()
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(kept[name])

    run = trained("dial_basic", {"dial": FAR})
    assert_weights(run.live, plain_training(gradient=gradient).state_dict())
    basic = trained("basic").live["classifier.weight"]
    assert (run.live["classifier.weight"] - basic).abs().max() > 1e-2


def test_it_takes_one_pass_more_than_steps_and_no_gradient_of_a_weight():
    run, batch = wide()
    _, seen = passes(run, batch)
    assert len(seen) == 1 + FAR["steps"] + 1
    assert seen[0].equal(batch.x)
    assert all(p.grad is None for p in run.parameters)
    assert not batch.x.requires_grad


def test_the_search_starts_from_noise_of_its_own():
    before = random_state()
    run = run_of("dial_basic", {"dial": {"noise": 0.01}}, rows=500)
    before = random_state()
    batch = run.batches(0)
    first, again = (passes(run, batch)[1][1] - batch.x for _ in range(2))
    assert first.equal(again)
    assert first.std().item() == pytest.approx(0.01, rel=0.05)
    assert first.mean().item() == pytest.approx(0.0, abs=0.001)
    run.t = 1
    assert not (passes(run, batch)[1][1] - batch.x).equal(first)
    run.t, run.seed = 0, 1
    assert not (passes(run, batch)[1][1] - batch.x).equal(first)
    assert random_state()["torch"].equal(before["torch"])
    assert random_state()["numpy"] == before["numpy"]


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.2, 0.8), (-1.0, 2.0)])
def test_images_stay_in_0_to_1_or_in_their_own_range(low, high):
    run = run_of("dial_basic", {"dial": {**FAR, "epsilon": 5.0, "step_size": 3.0}})
    batch = run.batches(0)
    x = (batch.x - batch.x.min()) / (batch.x.max() - batch.x.min()) * (high - low) + low
    _, seen = passes(run, replace(batch, x=x))
    assert seen[-1].min().item() == pytest.approx(min(low, 0.0), abs=1e-6)
    assert seen[-1].max().item() == pytest.approx(max(high, 1.0), abs=1e-6)


def test_running_statistics_are_those_of_the_natural_images():
    run, basic = run_of("dial_basic", {"dial": FAR}), run_of("basic")
    for each in (run, basic):
        each.loss(each.batches(0))
    for name in run.buffer_names:
        assert run.live[name].equal(basic.live[name]), name
    assert run.model.featurizer[2].track_running_stats


def test_a_weight_of_0_is_basic_to_the_bit_and_searches_nothing():
    found, basic = trained("dial_basic", {"dial": {"weight": 0}}), trained("basic")
    assert all(v.equal(basic.live[k]) for k, v in found.live.items())
    assert len(passes(found, found.batches(0))[1]) == 1


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_it_runs_in_half_precision(precision):
    run = trained("dial_basic", {"dial": FAR}, precision=precision)
    assert all(v.isfinite().all() for v in run.live.values() if v.is_floating_point())


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("weight", -1.0, "a finite number from 0 on"),
        ("steps", 0, "a number from 1 on"),
        ("step_size", -0.1, "a number from 0 on"),
        ("epsilon", -0.1, "a number from 0 on"),
        ("noise", -0.1, "a number from 0 on"),
    ],
)
def test_settings_out_of_range_are_refused(key, value, allowed):
    with pytest.raises(UserError, match=rf"trainer\.dial\.{key}={value}: {allowed}"):
        chain("dial_basic", dial={key: value})


def test_the_contract_holds_for_dial():
    check_link("dial", **FAR)
