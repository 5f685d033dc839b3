"""The two masks against DomainBed's loop over parameters, in float64."""

from __future__ import annotations

import pytest
import torch
from plain import assert_weights, forward, plain_training, risks_of, run_of, trained
from torch import nn

from dgavg import UserError, chain
from dgavg.testing.contract import same
from dgavg.trainers.gradient.masks import agreement, write_masked
from dgavg.trainers.gradient.passes import DomainGradients
from dgavg.trainers.gradient.sandmask import mask


def and_mask(grads, tau):
    """Of one tensor's gradients (domains, *shape)."""
    signs = [torch.sign(g) for g in grads]
    return ((sum(signs) / len(signs)).abs() >= tau).double()


def sand_mask(grads, tau, k):
    mean = sum(grads) / len(grads)
    variance = sum((g - mean) ** 2 for g in grads) / (len(grads) - 1)
    agree = (sum(torch.sign(g) for g in grads) / len(grads)).abs()
    return torch.relu(torch.tanh(k / variance * (agree - tau)))


def masked(grads, of_tensor):
    """DomainBed's gradient of one tensor."""
    kept = of_tensor(grads)
    return kept * (sum(grads) / len(grads)) / (1e-10 + kept.sum() / kept.numel())


def masked_training(of_tensor):
    def gradient(model, batch, t):
        _, logits = forward(model, batch)
        parameters = list(model.parameters())
        by_domain = [
            torch.autograd.grad(risk, parameters, retain_graph=True)
            for risk in risks_of(logits, batch)
        ]
        for p, grads in zip(parameters, zip(*by_domain, strict=True), strict=True):
            p.grad = masked(grads, of_tensor)

    return plain_training(gradient=gradient, steps=6).state_dict()


@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0])
def test_training_with_the_and_mask(tau):
    run = trained("andmask_basic", {"andmask": {"tau": tau}}, steps=6)
    assert_weights(run.live, masked_training(lambda g: and_mask(g, tau)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("tau", "k"), [(0.5, 0.01), (0.2, 0.1)])
def test_training_with_the_sand_mask(tau, k):
    run = trained("sandmask_basic", {"sandmask": {"tau": tau, "k": k}}, steps=6)
    assert_weights(run.live, masked_training(lambda g: sand_mask(g, tau, k)), rtol=1e-3, atol=1e-4)


def random_rows(domains):
    random = torch.Generator().manual_seed(domains)
    return torch.randn(domains, 40, generator=random, dtype=torch.float64)


@pytest.mark.parametrize("domains", [2, 3, 5])
@pytest.mark.parametrize("tau", [0.0, 0.1, 0.5, 0.9])
def test_the_sand_mask_is_the_definition(domains, tau):
    rows = random_rows(domains)
    torch.testing.assert_close(mask(rows, tau, 0.3), sand_mask(list(rows), tau, 0.3))


@pytest.mark.parametrize("domains", [2, 3, 5])
def test_agreement_is_how_far_signs_agree(domains):
    rows = random_rows(domains)
    rows[0, :10] = 0.0
    expected = [abs(sum(int(torch.sign(v)) for v in column)) / domains for column in rows.T]
    torch.testing.assert_close(agreement(rows), torch.tensor(expected, dtype=torch.float64))


def test_the_mask_of_domains_that_are_one():
    rows = torch.tensor([[1.0, -2.0, 0.0], [1.0, -2.0, 0.0]])
    assert mask(rows, 0.5, 10.0).tolist() == [1.0, 1.0, 0.0]
    assert mask(rows, 0.0, 10.0).tolist() == [1.0, 1.0, 0.0]


def gradients_of(rows):
    parameters = [nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(3))]
    return DomainGradients(None, rows, parameters, [True, True])


def test_what_is_kept_is_scaled_up_in_each_tensor():
    rows = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7], [3.0, 4, 5, 6, 7, 8, 9]])
    found = gradients_of(rows)
    write_masked(found, torch.tensor([1.0, 0, 0, 0.5, 1, 1, 1]))
    factor = 4 / 1.5
    torch.testing.assert_close(
        found.parameters[0].grad, torch.tensor([[2.0 * factor, 0], [0, 2.5 * factor]])
    )
    torch.testing.assert_close(found.parameters[1].grad, torch.tensor([6.0, 7.0, 8.0]))


def test_a_tensor_of_which_nothing_is_kept_stays():
    found = gradients_of(torch.ones(2, 7))
    write_masked(found, torch.tensor([0.0] * 4 + [1.0] * 3))
    assert not found.parameters[0].grad.any()
    assert found.parameters[1].grad.tolist() == [1.0] * 3


def test_an_agreement_of_0_is_no_mask():
    run, basic = run_of("andmask_basic", {"andmask": {"tau": 0}}), run_of("basic")
    for each in (run, basic):
        each.grad(each.batches(0))
    for mine, theirs in zip(run.parameters, basic.parameters, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_a_steep_sand_mask_is_the_and_mask():
    settings = {"sandmask": {"tau": 0.5, "k": 1e12}, "andmask": {"tau": 0.6}}
    found = [trained(f"{k}_basic", {k: v}).live for k, v in settings.items()]
    assert same(*found)


@pytest.mark.parametrize("spec", ["andmask_basic", "sandmask_basic"])
def test_gradients_that_are_not_finite_are_not_hidden(spec):
    """Loss scaling has to see them."""
    rows = torch.ones(2, 7)
    rows[0, 1], rows[1, 5] = torch.inf, torch.nan
    rows[1, 1] = -1.0
    found = gradients_of(rows)
    chosen = mask(rows, 0.5, 1.0) if spec == "sandmask_basic" else (agreement(rows) >= 1).float()
    write_masked(found, chosen)
    assert not found.parameters[0].grad.isfinite().all()
    assert not found.parameters[1].grad.isfinite().all()


@pytest.mark.parametrize("tau", [-0.1, 1.1])
def test_an_agreement_outside_0_to_1_is_refused(tau):
    with pytest.raises(UserError, match=r"trainer.andmask.tau=.*: a number in \[0, 1\]"):
        chain("andmask_basic", andmask={"tau": tau})


@pytest.mark.parametrize("tau", [-0.1, 1.0])
def test_a_sand_mask_that_is_0_everywhere_is_refused(tau):
    with pytest.raises(UserError, match=r"sandmask.tau=.*: a number in \[0, 1\); at 1 nothing is"):
        chain("sandmask_basic", sandmask={"tau": tau})


def test_a_steepness_of_0_is_refused():
    with pytest.raises(UserError, match=r"trainer.sandmask.k=0.0: a number above 0"):
        chain("sandmask_basic", sandmask={"k": 0})
