"""Loss scaling and clipping below every gradient link, against plain gradients."""

from __future__ import annotations

import copy
import io
import math
from dataclasses import replace

import pytest
import torch
from plain import run_of
from torch import nn

from dgavg import Trainer, UserError, fit, trainer
from dgavg.testing.contract import same
from dgavg.update import INTERVAL, Update

LINKS = {"basic": {}, "sam_basic": {"sam": {"rho": 0.05}}, "andmask_basic": {}}
SPECS = pytest.mark.parametrize("spec", LINKS)


@trainer("explodes")
class Explodes(Trainer):
    """At step 2, adds a finite term whose scaled gradient is past what float16 holds."""

    def loss(self, run, batch):
        out = self.inner.loss(run, batch)
        if run.t == 2:
            out.terms["explodes"] = 10.0 * out.logits.sum()
        return out


@trainer("endless")
class Endless(Trainer):
    """Adds a term of 0 whose gradient is not a number."""

    def loss(self, run, batch):
        out = self.inner.loss(run, batch)
        out.terms["endless"] = (0.0 * out.logits).sum().sqrt()
        return out


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-2)


def half(spec, **options):
    return run_of(spec, LINKS.get(spec), precision="fp16", **options)


def gradients(run, weights=None):
    run.grad(replace(run.batches(0), weights=weights))
    return [p.grad.clone() for p in run.parameters]


def norm(tensors):
    return torch.cat([t.flatten() for t in tensors]).norm().item()


@SPECS
def test_gradients_of_float16_are_in_plain_units(spec):
    plain = gradients(run_of(spec, LINKS[spec]))
    found = gradients(half(spec))
    apart = norm([a - b for a, b in zip(found, plain, strict=True)])
    # entries that the AND-mask keeps by a hair in one precision are masked in the other
    assert apart < (0.3 if spec == "andmask_basic" else 0.01) * norm(plain)


def test_gradients_too_small_for_float16_are_kept():
    tiny = torch.full((3,), 1e-8)
    plain, found = gradients(run_of("basic"), tiny), gradients(half("basic"), tiny)
    assert norm([a - b for a, b in zip(found, plain, strict=True)]) < 0.02 * norm(plain)
    unscaled = half("basic")
    unscaled.update.scale = 1.0
    assert not any(g.any() for g in gradients(unscaled, tiny)[:2])


def state_of(run):
    weights = {k: v.clone() for k, v in run.model.named_parameters()}
    return weights, copy.deepcopy(run.optimizer.state_dict())


@pytest.mark.parametrize("spec", ["explodes_basic", "explodes_sam_basic", "explodes_andmask_basic"])
def test_an_update_that_overflows_is_skipped_and_the_scale_halved(spec):
    run, scales = half(spec, optimizer=adam), []
    for t in range(4):
        before = state_of(run)
        loss = run.step(run.batches(t))
        run.t += 1
        assert loss.total.isfinite()
        assert same(before[0], state_of(run)[0]) == (t == 2)
        assert same(before[1]["state"], state_of(run)[1]["state"]) == (t == 2)
        scales.append((run.update.scale, run.update.good))
    assert scales == [(2**16, 1), (2**16, 2), (2**15, 0), (2**15, 1)]


def test_the_scale_doubles_after_2000_good_updates():
    run = half("basic")
    run.update.good = INTERVAL - 2
    found = []
    for t in range(3):
        run.step(run.batches(t))
        found.append((run.update.scale, run.update.good))
    assert INTERVAL == 2000
    assert found == [(2**16, INTERVAL - 1), (2**17, 0), (2**17, 1)]


@pytest.mark.parametrize("at", [2, 3, 5])
def test_a_resumed_run_ends_as_one_that_never_stopped(at):
    whole, file = half("explodes_sam_basic", optimizer=adam), io.BytesIO()
    fit(whole, after_step=lambda run: torch.save(run.state_dict(), file) if run.t == at else None)
    file.seek(0)
    again = half("explodes_sam_basic", optimizer=adam)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert (again.update.scale == 2**15) == (at > 2)
    fit(again)
    assert same(whole.state_dict(), again.state_dict())
    assert (whole.update.scale, whole.update.good) == (2**15, 9)


def test_gradients_that_are_never_finite_end_the_run():
    run = half("endless_basic", steps=60)
    with pytest.raises(UserError, match=r"not finite, however small the loss.*try precision=bf16"):
        fit(run)


@pytest.mark.parametrize("saved", ["fp16", "fp32"])
def test_a_checkpoint_of_another_precision_is_refused(saved):
    other = {"fp16": "fp32", "fp32": "fp16"}[saved]
    state = run_of("basic", precision=saved).state_dict()
    with pytest.raises(UserError, match="one is of precision fp16, the other is not"):
        run_of("basic", precision=other).load_state_dict(state)


def two_alike(scaled, frozen=False):
    """Two parameters that enter as their sum, so autograd gives both one tensor."""
    a, b, c = (nn.Parameter(torch.tensor([1.0, 2.0])) for _ in range(3))
    c.requires_grad_(not frozen)
    update = Update([a, b, c], torch.optim.SGD([a, b, c], lr=1.0), scaled=scaled)
    return update, (a, b, c), (a + b).square().sum() + c.sum()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_that_autograd_shares_are_divided_once(scaled, create_graph):
    update, _, loss = two_alike(scaled)
    found = update.gradients(loss, create_graph=create_graph)
    assert [g.tolist() for g in found] == [[4.0, 8.0], [4.0, 8.0], [1.0, 1.0]]
    assert found[0].requires_grad == create_graph


@pytest.mark.parametrize("scaled", [False, True])
def test_backward_adds_to_what_is_there(scaled):
    update, parameters, loss = two_alike(scaled)
    loss.backward(retain_graph=True)
    update.backward(loss)
    assert [p.grad.tolist() for p in parameters] == [[8.0, 16.0], [8.0, 16.0], [2.0, 2.0]]


@pytest.mark.parametrize("scaled", [False, True])
def test_a_parameter_that_is_frozen_has_no_gradient(scaled):
    update, _, loss = two_alike(scaled, frozen=True)
    found = update.gradients(loss)
    assert found[2] is None
    assert found[0].tolist() == [4.0, 8.0]


def test_the_graph_is_kept_where_asked_for():
    update, _, loss = two_alike(scaled=False)
    update.gradients(loss, retain=True)
    update.gradients(loss)
    with pytest.raises(RuntimeError, match="second time"):
        update.gradients(loss)


def test_second_derivatives_are_in_plain_units():
    update, (a, *_), loss = two_alike(scaled=True)
    first = update.gradients(loss, create_graph=True)[0]
    second = update.gradients(first.sum() * 3.0)
    assert second[0].tolist() == [6.0, 6.0]
    assert second[2] is None
    assert a.grad is None


CLIPPED = ["basic", "sam_basic", "andmask_basic", "pcgrad_basic", "sam_pcgrad_basic"]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("spec", CLIPPED)
def test_the_last_gradient_is_clipped_as_torch_would(spec, precision):
    run = run_of(spec, precision=precision, clip=0.05)
    free = run_of(spec, precision=precision)
    run.step(run.batches(0))
    free.grad(free.batches(0))
    nn.utils.clip_grad_norm_(free.parameters, 0.05)
    found, expected = ([p.grad for p in r.parameters] for r in (run, free))
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))
    assert math.isclose(norm(found), 0.05, rel_tol=1e-4)


@pytest.mark.parametrize("spec", CLIPPED)
def test_a_gradient_below_the_limit_is_left_alone(spec):
    run, free = run_of(spec, clip=1e4), run_of(spec)
    for each in (run, free):
        fit(each)
    assert same(run.live, free.live)


def test_an_update_without_any_gradient_counts_as_good():
    parameter = nn.Parameter(torch.ones(1))
    update = Update([parameter], torch.optim.SGD([parameter], lr=1.0), scaled=True, clip=1.0)
    update.step()
    assert update.good == 1
