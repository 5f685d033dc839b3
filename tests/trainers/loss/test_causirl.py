"""CausIRL against DomainBed's loop that pools the parts of the domains."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from plain import (
    assert_weights,
    domains_of,
    forward,
    mean,
    plain_training,
    risks_of,
    run_of,
    trained,
)

from dgavg import UserError, chain, fit
from dgavg.testing import check_link, toy_run
from dgavg.trainers.loss.causirl import DISTANCES, CausIRL

WIDTHS = [10.0**k for k in range(-3, 4)]
BOTH = pytest.mark.parametrize("statistic", ["coral", "mmd"])


def plain_coral(x, y):
    spread = [torch.stack([torch.outer(r - p.mean(0), r - p.mean(0)) for r in p]) for p in (x, y)]
    cov = [s.sum(0) / (len(s) - 1) for s in spread]
    return (x.mean(0) - y.mean(0)).pow(2).mean() + (cov[0] - cov[1]).pow(2).mean()


def plain_mmd(x, y):
    def k(p, q):
        squares = [(a - b).square().sum() for a in p for b in q]
        return mean([sum((-gamma * d).exp() for gamma in WIDTHS) for d in squares])

    return k(x, x) + k(y, y) - 2 * k(x, y)


PLAIN = {"coral": plain_coral, "mmd": plain_mmd}


def cuts_of(t, rows, domains=3):
    random = np.random.default_rng([0, t, zlib.crc32(b"causirl")])
    return random.integers(rows, size=domains)


def plain_penalty(features, batch, t, statistic):
    rows = domains_of(batch)
    cuts = cuts_of(t, len(rows[0]), len(rows))
    heads = [features[r[:cut]] for r, cut in zip(rows, cuts, strict=True)]
    tails = [features[r[cut:]] for r, cut in zip(rows, cuts, strict=True)]
    first, second = torch.cat(heads), torch.cat(tails)
    if len(first) < 2 or len(second) < 2:
        return features.sum() * 0
    return PLAIN[statistic](first, second)


@BOTH
@pytest.mark.parametrize("first", [2, 3, 5])
def test_the_distance_and_its_gradient_are_the_plain_ones(statistic, first):
    random = torch.Generator().manual_seed(first)
    features = torch.randn(7, 3, generator=random, dtype=torch.float64).requires_grad_()
    found = DISTANCES[statistic](features, first)
    expected = PLAIN[statistic](features[:first], features[first:])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    slopes = [torch.autograd.grad(value, features)[0] for value in (found, expected)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-8, atol=1e-11)


@BOTH
@pytest.mark.parametrize("rows", [2, 4])
def test_training_adds_the_distance_of_this_steps_pools(statistic, rows):
    def loss(model, batch, t):
        features, logits = forward(model, batch)
        penalty = plain_penalty(features, batch, t, statistic)
        return mean(risks_of(logits, batch)) + 2.5 * penalty

    settings = {"causirl": {"weight": 2.5, "statistic": statistic}}
    run = trained("causirl_basic", settings, rows=rows, steps=8)
    expected = plain_training(loss, rows=rows, steps=8).state_dict()
    near = {"rtol": 5e-3, "atol": 5e-4} if statistic == "mmd" else {}  # narrow kernels in float32
    assert_weights(run.live, expected, **near)


def test_steps_with_less_than_two_rows_in_a_pool_add_nothing():
    run = run_of("causirl_basic", {"causirl": {"weight": 1e3}}, rows=2)
    sizes = set()
    for run.t in range(12):
        first = int(cuts_of(run.t, 2).sum())
        out = run.loss(run.batches(run.t))
        assert (out.terms["causirl"].item() > 0) == (first > 1)
        sizes.add(first)
    assert {0, 1} & sizes
    assert {2, 3} & sizes


def test_a_step_of_several_passes_cuts_once():
    run = run_of("causirl_basic")
    batch = run.batches(0)
    assert run.loss(batch).terms["causirl"] > 0
    terms = []
    for run.t in (0, 0, 1):
        run.model.eval()
        terms.append(run.loss(batch).terms["causirl"])
    assert terms[0] == terms[1] != terms[2]


def test_weight_0_is_basic():
    found, basic = trained("causirl_basic", {"causirl": {"weight": 0}}), trained("basic")
    for name, tensor in found.live.items():
        torch.testing.assert_close(tensor, basic.live[name], rtol=1e-4, atol=1e-5)


def test_soft_labels_train():
    fit(toy_run("causirl_mixup_basic"))


def test_defaults_are_domainbeds():
    assert CausIRL(chain("basic")).settings() == {"weight": 1.0, "statistic": "coral"}


def test_settings_out_of_range_are_refused():
    with pytest.raises(UserError, match=r"trainer\.causirl\.weight=-1\.0: a finite number from 0"):
        chain("causirl_basic", causirl={"weight": -1})
    with pytest.raises(
        UserError, match=r"trainer\.causirl\.statistic=mean: choose one of coral, mmd"
    ):
        chain("causirl_basic", causirl={"statistic": "mean"})


def test_one_image_of_a_domain_is_refused():
    with pytest.raises(UserError, match="causirl needs at least 2 images of each domain a batch"):
        run_of("causirl_basic", rows=1)


def test_a_single_domain_is_refused():
    with pytest.raises(UserError, match="'causirl' needs at least 2 training domains, here is 1"):
        run_of("causirl_basic", domains=1)


@BOTH
def test_the_contract(statistic):
    check_link("causirl", weight=1000.0, statistic=statistic)
