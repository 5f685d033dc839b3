"""EQRM against autograd through DomainBed's search, and against finite differences."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from plain import (
    assert_weights,
    forward,
    mean,
    risks_of,
    run_of,
    sgd,
    trained,
)
from torch.distributions import Normal

from dgavg import UserError, chain, fit
from dgavg.testing import ToyBatches, check_link, toy_model, toy_run
from dgavg.testing.contract import same
from dgavg.trainers.loss.eqrm import EQRM
from dgavg.trainers.loss.quantile import smooth_quantile

RISKS = ([0.3, 0.9], [0.7, 0.2, 1.4], [1.0, 1.0001, 0.9999], [2.0, 0.1, 0.4, 0.5, 3.0, 0.45])
ALPHAS = (0.05, 0.5, 0.75, 0.99)


def searched(risks, alpha):
    """`Nonparametric.icdf` of DomainBed: 32 halvings that autograd follows."""
    ordered, _ = torch.sort(risks)
    width = 1.06 * torch.std(ordered, unbiased=True) * len(risks) ** -0.2
    level = torch.tensor(alpha, dtype=torch.float64)
    ends = [Normal(ordered[0], width).icdf(level), Normal(ordered[-1], width).icdf(level)]
    middle = 0.5 * sum(ends)
    for _ in range(32):
        below = Normal(ordered, width).cdf(middle).mean()
        ends[int(below > level)] = middle
        middle = 0.5 * sum(ends)
    return middle


def bisected(risks, alpha):
    """The quantile of plain numbers, to the last bit."""
    spread = math.sqrt(sum((r - mean(risks)) ** 2 for r in risks) / (len(risks) - 1))
    width = 1.06 * spread * len(risks) ** -0.2
    low, high = min(risks) - 9 * width, max(risks) + 9 * width
    for _ in range(200):
        middle = (low + high) / 2
        heights = [0.5 * math.erfc((r - middle) / width / math.sqrt(2)) for r in risks]
        low, high = (middle, high) if mean(heights) < alpha else (low, middle)
    return low


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("risks", RISKS)
def test_the_quantile_and_its_gradient_are_domainbeds(risks, alpha):
    values = torch.tensor(risks, dtype=torch.float64).requires_grad_()
    expected = searched(values, alpha)
    expected.backward()
    found, slope = smooth_quantile(values, alpha, exact=False)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(slope, values.grad, rtol=1e-9, atol=1e-9)
    assert not slope.requires_grad


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("risks", RISKS)
def test_the_exact_derivative_is_that_of_finite_differences(risks, alpha):
    found, slope = smooth_quantile(torch.tensor(risks, dtype=torch.float64), alpha, exact=True)
    assert found.item() == pytest.approx(bisected(risks, alpha), rel=1e-9)
    step = 1e-5 * (max(risks) - min(risks))
    for i in range(len(risks)):
        moved = [[r + s * (i == j) for j, r in enumerate(risks)] for s in (step, -step)]
        change = bisected(moved[0], alpha) - bisected(moved[1], alpha)
        assert slope[i].item() == pytest.approx(change / (2 * step), abs=1e-6)


@pytest.mark.parametrize("exact", [False, True])
def test_of_equal_risks_it_is_their_mean(exact):
    for values in (torch.full((3,), math.log(3)), torch.zeros(2), torch.full((5,), 0.1).double()):
        found, slope = smooth_quantile(values, 0.75, exact=exact)
        torch.testing.assert_close(found, values[0])
        torch.testing.assert_close(slope, torch.full_like(values, 1 / len(values)))


@pytest.mark.parametrize("exact", [False, True])
def test_moving_all_risks_moves_the_quantile_as_much(exact):
    for risks in RISKS:
        slope = smooth_quantile(torch.tensor(risks), 0.9, exact=exact)[1]
        assert slope.dtype == torch.float32
        assert slope.sum().item() == pytest.approx(1, abs=1e-5)


def plain_eqrm(burnin, rate):
    """A loop whose optimizer is made anew, at another rate, where the burn-in ends."""
    model, batches = toy_model().double(), ToyBatches()
    optimizer = sgd(model.parameters())
    for t in range(12):
        if t == burnin:
            optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
        batch = batches(t)
        risks = risks_of(forward(model, batch)[1], batch)
        optimizer.zero_grad()
        (searched(torch.stack(risks), 0.9) if t >= burnin else mean(risks)).backward()
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("burnin", [0, 5])
def test_training_minimises_the_quantile_from_burnin_on_at_its_own_rate(burnin):
    run = trained("eqrm_basic", {"eqrm": {"alpha": 0.9, "burnin": burnin, "rate": 0.02}})
    assert_weights(run.live, plain_eqrm(burnin, rate=0.02))


def test_the_total_is_the_quantile_and_the_term_has_no_gradient():
    run = run_of("eqrm_basic", {"eqrm": {"burnin": 0}})
    out = run.loss(run.batches(0))
    expected = searched(out.risks.detach().double(), 0.75)
    assert out.total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert not out.terms["eqrm"].requires_grad
    assert not out.weights.requires_grad


def test_before_burnin_it_is_basic():
    run, basic = run_of("eqrm_basic", {"eqrm": {"burnin": 11}}), run_of("basic")
    for t in range(11):
        for one in (run, basic):
            one.step(one.batches(t))
            one.t += 1
            one.tap("after_step")
    assert same(run.live, basic.live)
    assert not run.optimizer.state


@pytest.mark.parametrize("derivative", ["code", "exact"])
def test_weights_multiply_those_there_are(derivative):
    run = run_of("eqrm_basic", {"eqrm": {"burnin": 0, "derivative": derivative}})
    batch = run.batches(0)
    whole = run.loss(batch)
    _, slope = smooth_quantile(whole.risks, 0.75, exact=derivative == "exact")
    torch.testing.assert_close(whole.weights, slope)
    for choice in torch.eye(3):
        one = run.loss(replace(batch, weights=choice)).weights
        torch.testing.assert_close(one, 3 * choice * slope)


def test_the_derivative_is_a_setting():
    found = [
        trained("eqrm_basic", {"eqrm": {"burnin": 0, "rate": 0.1, "derivative": k}}).live
        for k in ("code", "exact")
    ]
    assert not same(*found)


def test_the_rate_is_in_the_ratio_of_the_schedules():
    run = run_of(
        "eqrm_basic", {"eqrm": {"burnin": 4, "rate": 1e-3}}, schedule=lambda t: 1 / (1 + t)
    )
    rates = []
    for run.t in range(8):
        rates.append(run.lr())
    assert rates[:4] == [0.1 / (1 + t) for t in range(4)]
    assert rates[4:] == pytest.approx([1e-3 / (1 + t) for t in range(4, 8)])


def test_without_a_rate_the_learning_rate_stays():
    run = run_of("eqrm_basic", {"eqrm": {"burnin": 0, "rate": None}})
    assert run.lr() == 0.1


def test_alpha_may_follow_a_schedule():
    alpha = {"linear": {"from": 0.5, "to": 0.9}}
    fit(toy_run("eqrm_basic", {"eqrm": {"alpha": alpha, "burnin": 0, "rate": 0.01}}))


def test_order_across_planes_makes_no_difference():
    settings = {"eqrm": {"burnin": 0, "rate": 0.01}, "sam": {"rho": 0.5}}
    runs = [toy_run(spec, settings) for spec in ("eqrm_sam_basic", "sam_eqrm_basic")]
    for run in runs:
        fit(run)
    assert same(runs[0].live, runs[1].live)


def test_soft_labels_train():
    fit(toy_run("eqrm_mixup_basic", {"eqrm": {"burnin": 2}}))


def test_defaults_are_domainbeds():
    expected = {"alpha": 0.75, "burnin": 2500, "rate": 1e-6, "derivative": "code"}
    assert EQRM(chain("basic")).settings() == expected


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("alpha", 0.0, r"alpha=0\.0: between 0 and 1"),
        ("alpha", 1.0, r"alpha=1\.0: between 0 and 1"),
        ("burnin", -1, r"burnin=-1\.0: a number from 0 on"),
        ("rate", 0.0, r"rate=0\.0: a learning rate above 0, or null"),
        ("rate", float("inf"), r"rate=inf: a learning rate above 0, or null"),
        ("derivative", "paper", r"derivative=paper: choose one of code, exact"),
    ],
)
def test_settings_out_of_range_are_refused(key, value, message):
    with pytest.raises(UserError, match=rf"trainer\.eqrm\.{message}"):
        chain("eqrm_basic", eqrm={key: value})


def test_a_burnin_as_long_as_the_run_is_refused():
    with pytest.raises(UserError, match=r"trainer\.eqrm\.burnin=2500 is past the end"):
        toy_run("eqrm_basic")


def test_a_single_domain_is_refused():
    with pytest.raises(UserError, match="'eqrm' needs at least 2 training domains, here is 1"):
        run_of("eqrm_basic", domains=1)


@pytest.mark.parametrize("derivative", ["code", "exact"])
def test_the_contract(derivative):
    check_link("eqrm", burnin=3, rate=1e-2, derivative=derivative)
