"""GSAM against two explicit gradients on a deep copy, decomposed by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from plain import assert_weights, erm, plain_training, run_of, trained

from dgavg import Trainer, UserError, chain, trainer
from dgavg.testing.contract import same
from dgavg.trainers.gradient.gsam import less_orthogonal


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def orthogonal_part(first, second):
    """By Gram and Schmidt: `first` less its projection on the unit vector along `second`."""
    unit = second / second.norm()
    return first - (first @ unit) * unit


def gsam_gradient(rho_at, alpha):
    def gradient(model, batch, t):
        twin = copy.deepcopy(model)
        erm(model, batch, t).backward()
        first = flat([p.grad for p in model.parameters()])
        with torch.no_grad():
            for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
                mine += rho_at(t) * theirs.grad / first.norm()
        twin.zero_grad()
        erm(twin, batch, t).backward()
        second = flat([p.grad for p in twin.parameters()])
        found = second - alpha * orthogonal_part(first, second)
        sizes = [p.numel() for p in model.parameters()]
        for p, part in zip(model.parameters(), found.split(sizes), strict=True):
            p.grad = part.view_as(p)

    return gradient


def test_training_steps_with_the_second_gradient_less_the_other_part_of_the_first():
    run = trained("gsam_basic", {"gsam": {"rho": 0.5, "alpha": 0.4}})
    model = plain_training(gradient=gsam_gradient(lambda t: 0.5, 0.4))
    assert_weights(run.live, model.state_dict())
    sam = trained("sam_basic", {"sam": {"rho": 0.5}}).live["classifier.weight"]
    assert (run.live["classifier.weight"] - sam).abs().max() > 1e-3


def test_the_radius_falls_with_the_learning_rate():
    settings = {"gsam": {"rho": 0.5, "rho_min": 0.1, "alpha": 0.4}}
    run = run_of("gsam_basic", settings, schedule=lambda t: 1 - t / 12)
    assert math.isclose(run.trainer.radius(run), 0.5)
    run.t = 6
    assert math.isclose(run.trainer.radius(run), 0.3)
    run.t = 12
    assert math.isclose(run.trainer.radius(run), 0.1)


@pytest.mark.parametrize("rho_min", [None, 0.0, 0.3])
def test_at_a_constant_learning_rate_the_radius_is_constant(rho_min):
    run = run_of("gsam_basic", {"gsam": {"rho": 0.3, "rho_min": rho_min}})
    assert [run.trainer.radius(run) for run.t in range(3)] == [0.3] * 3


def test_the_gradient_is_the_definition_in_float64():
    random = torch.Generator().manual_seed(0)
    shapes = [(3, 2), (4,), (2, 2, 2)]
    first, second = (
        [torch.randn(s, generator=random, dtype=torch.float64) for s in shapes] for _ in range(2)
    )
    found = flat(less_orthogonal(first, second, 0.7))
    one, other = flat(first), flat(second)
    torch.testing.assert_close(found, other - 0.7 * orthogonal_part(one, other))
    assert abs((other - found) @ other) < 1e-12


def test_a_second_gradient_of_0_has_no_direction():
    first, second = [torch.ones(2)], [torch.zeros(2)]
    assert less_orthogonal(first, second, 0.5)[0].tolist() == [-0.5, -0.5]


def test_without_the_orthogonal_part_it_is_sam_to_the_bit():
    gsam = trained("gsam_basic", {"gsam": {"rho": 0.5, "alpha": 0.0}})
    assert same(gsam.live, trained("sam_basic", {"sam": {"rho": 0.5}}).live)


def test_a_radius_of_0_is_basic_to_the_bit():
    assert same(trained("gsam_basic", {"gsam": {"rho": 0.0}}).live, trained("basic").live)


def test_weights_statistics_and_loss_are_those_of_the_first_pass():
    run, basic = run_of("gsam_basic", {"gsam": {"rho": 2.0}}), run_of("basic")
    weights = {k: v.clone() for k, v in run.model.named_parameters()}
    losses = [each.grad(each.batches(0)).total for each in (run, basic)]
    assert losses[0].equal(losses[1])
    assert all(v.equal(weights[k]) for k, v in run.model.named_parameters())
    assert all(run.live[k].equal(basic.live[k]) for k in run.buffer_names)


@trainer("fickle")
class Fickle(Trainer):
    """Gives the first parameter a gradient in the first pass alone, the last in the second."""

    def grad(self, run, batch):
        out = self.inner.grad(run, batch)
        second = run.model.featurizer[2].track_running_stats is False
        run.parameters[0 if second else -1].grad = None
        return out


@pytest.mark.parametrize("name", ["gsam", "sagm"])
def test_a_parameter_that_one_pass_does_not_reach_has_the_second_passes_gradient(name):
    run = run_of(f"{name}_fickle_basic")
    run.grad(run.batches(0))
    assert run.parameters[0].grad is None
    fickle = run_of(f"{name}_fickle_basic", {name: {"rho": 1e-9, "alpha": 0.0}})
    fickle.grad(fickle.batches(0))
    plain = run_of("basic")
    plain.grad(plain.batches(0))
    torch.testing.assert_close(fickle.parameters[-1].grad, plain.parameters[-1].grad)


@pytest.mark.parametrize("name", ["rho", "rho_min", "alpha"])
def test_negative_settings_are_refused(name):
    with pytest.raises(UserError, match=rf"trainer.gsam.{name}=-0.1: a number from 0 on"):
        chain("gsam_basic", gsam={name: -0.1})
