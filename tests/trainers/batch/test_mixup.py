"""Mixup against a loop over pairs of domains."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from plain import STEPS, assert_weights, erm, plain_training, run_of

from dgavg import Trainer, UserError, chain, fit, trainer
from dgavg.seeding import random_state
from dgavg.testing import check_link


def mixed(t=0, alpha=1.0, domains=4, seed=0):
    run = run_of("mixup_basic", {"mixup": {"alpha": alpha}}, domains=domains, seed=seed)
    run.t = t
    batch = run.batches(t)
    return run, batch, run.prepare(batch)


def pairs_of(batch, blend):
    """(i, j, λ) of each domain i, solved from the images: blendᵢ = λxᵢ + (1 − λ)xⱼ."""
    x = batch.by_domain(batch.x).flatten(1).double().numpy()
    z = blend.by_domain(blend.x).flatten(1).double().numpy()
    found = []
    for i in range(len(x)):
        for j in range(len(x)):
            way = x[i] - x[j]
            share = ((z[i] - x[j]) @ way) / max(way @ way, 1e-12)
            if i != j and np.allclose(z[i], share * x[i] + (1 - share) * x[j], atol=1e-5):
                found.append((i, j, share))
    return found


@pytest.mark.parametrize("domains", [2, 4])
def test_partners_form_one_cycle_and_every_pair_has_its_own_share(domains):
    for t in range(6):
        _, batch, blend = mixed(t, domains=domains)
        pairs = pairs_of(batch, blend)
        assert [i for i, _, _ in pairs] == list(range(domains))
        partner, place, seen = {i: j for i, j, _ in pairs}, 0, []
        for _ in range(domains):
            seen.append(place)
            place = partner[place]
        assert sorted(seen) == list(range(domains))
        shares = [share for _, _, share in pairs]
        assert all(-1e-6 <= share <= 1 + 1e-6 for share in shares)
        assert len({round(share, 5) for share in shares}) == domains


def test_the_cycle_is_drawn_anew_every_step():
    cycles = {tuple(j for _, j, _ in pairs_of(*mixed(t)[1:])) for t in range(20)}
    assert len(cycles) == 6  # all cycles of four domains


def test_the_batch_that_is_blended_is_that_of_the_links_inside():
    @trainer("darken")
    class Darken(Trainer):
        """Halves the images."""

        def prepare(self, run, batch):
            batch = self.inner.prepare(run, batch)
            return replace(batch, x=batch.x / 2)

    run, bright = run_of("mixup_darken_basic"), run_of("mixup_basic")
    found, expected = (r.prepare(r.batches(0)).x for r in (run, bright))
    assert torch.equal(found, expected / 2)


def test_the_loss_is_that_of_both_labels():
    run, batch, blend = mixed()
    loss = run.loss(blend)
    y = batch.by_domain(batch.y)
    logits = blend.by_domain(run.forward(blend.x)[1].double())
    for i, j, share in pairs_of(batch, blend):
        both = share * F.cross_entropy(logits[i], y[i]) + (1 - share) * F.cross_entropy(
            logits[i], y[j]
        )
        assert loss.risks[i].item() == pytest.approx(both.item(), rel=1e-4)


def test_training_takes_the_blended_batch():
    run = run_of("mixup_basic", {"mixup": {"alpha": 1.0}})
    twin = run_of("basic")
    blend = run.prepare(run.batches(0))
    run.step(run.batches(0))
    twin.step(blend)
    for name, tensor in run.live.items():
        assert tensor.equal(twin.live[name]), name


def test_shares_follow_the_beta_distribution():
    """Beta(a, a) has mean 1/2 and variance 1/(4(2a + 1))."""
    for alpha in (0.2, 4.0):
        shares = [s for t in range(150) for _, _, s in pairs_of(*mixed(t, alpha)[1:])]
        assert np.mean(shares) == pytest.approx(0.5, abs=0.06)
        assert np.var(shares) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.2)


def test_a_blended_row_keeps_its_domain_and_the_batch_its_originals():
    run, batch, blend = mixed()
    assert blend.d.equal(batch.d)
    assert blend.domains == batch.domains
    again = run.batches(0)
    assert batch.x.equal(again.x)
    assert batch.y.equal(again.y)


def test_the_draw_is_the_same_within_a_step_and_another_in_the_next():
    run, batch, blend = mixed(t=3)
    assert run.prepare(batch).x.equal(blend.x)
    run.t = 4
    assert not run.prepare(batch).x.equal(blend.x)
    run.t, run.seed = 3, 1
    assert not run.prepare(batch).x.equal(blend.x)


def test_global_random_numbers_are_left_alone():
    before = random_state()
    mixed()
    after = random_state()
    assert after["torch"].equal(before["torch"])
    assert after["numpy"] == before["numpy"]
    assert after["python"] == before["python"]


def test_labels_that_are_probabilities_already_are_blended_too():
    run, batch, blend = mixed()
    batch.y = F.one_hot(batch.y, 3).float() * 0.7 + 0.1
    torch.testing.assert_close(run.prepare(batch).y, blend.y * 0.7 + 0.1)


@pytest.mark.parametrize("alpha", [0, -1.0])
def test_an_alpha_that_is_not_above_0_is_refused(alpha):
    with pytest.raises(UserError, match=r"mixup.alpha=.*: a number above 0"):
        chain("mixup_basic", mixup={"alpha": alpha})


def mixed_within(t=0, rows=6, domains=2):
    settings = {"mixup": {"alpha": 1.0, "across": False}}
    run = run_of("mixup_basic", settings, rows=rows, domains=domains)
    run.t = t
    batch = run.batches(t)
    return run, batch, run.prepare(batch)


def pairs_within(batch, blend):
    """Of each domain, (j, λ) of each row i, solved from images: blendᵢ = λxᵢ + (1 − λ)xⱼ."""
    found = []
    for rows, mixes in zip(batch.by_domain(batch.x), blend.by_domain(blend.x), strict=True):
        x, z = rows.flatten(1).double().numpy(), mixes.flatten(1).double().numpy()
        pairs = []
        for i in range(len(x)):
            for j in sorted(range(len(x)), key=lambda j: j != i):  # itself first: it fits all
                way = x[i] - x[j]
                share = ((z[i] - x[j]) @ way) / max(way @ way, 1e-12) if i != j else 1.0
                if np.allclose(z[i], share * x[i] + (1 - share) * x[j], atol=1e-5):
                    pairs.append((j, share))
                    break
        found.append(pairs)
    return found


def test_within_domains_partners_are_a_random_order_of_the_domain_and_a_domain_has_one_share():
    orders = set()
    for t in range(12):
        _, batch, blend = mixed_within(t)
        for pairs in pairs_within(batch, blend):
            partners = [j for j, _ in pairs]
            assert sorted(partners) == list(range(6))
            shares = [s for i, (j, s) in enumerate(pairs) if i != j]
            assert np.ptp(shares) < 1e-4
            orders.add(tuple(partners))
    assert len(orders) == 24  # no domain and no step has another's


def test_within_domains_labels_are_mixed_as_images_are():
    _, batch, blend = mixed_within()
    y = F.one_hot(batch.by_domain(batch.y), 3).double()
    for d, pairs in enumerate(pairs_within(batch, blend)):
        share = next(s for i, (j, s) in enumerate(pairs) if i != j)
        partners = [j for j, _ in pairs]
        expected = share * y[d] + (1 - share) * y[d][partners]
        torch.testing.assert_close(
            blend.by_domain(blend.y)[d].double(), expected, rtol=0, atol=1e-4
        )


def test_within_works_on_one_domain_across_is_refused():
    _, batch, blend = mixed_within(domains=1)
    assert not blend.x.equal(batch.x)
    with pytest.raises(UserError, match=r"here is 1; or write trainer\.mixup\.across=false"):
        run_of("mixup_basic", domains=1)


def test_a_batch_of_one_domain_handed_down_is_refused_across():
    run, batch, _ = mixed()
    with pytest.raises(UserError, match="'mixup' mixes across domains, and here is one"):
        run.prepare(batch.split()[0])


def test_weights_of_domains_are_kept():
    run, batch, _ = mixed()
    weights = torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert run.prepare(replace(batch, weights=weights)).weights is weights


@pytest.mark.parametrize("across", [True, False])
def test_training_is_that_on_both_labels(across):
    run = run_of("mixup_basic", {"mixup": {"alpha": 1.0, "across": across}})
    blends = {}
    for t in range(STEPS):
        run.t = t
        blends[t] = run.prepare(run.batches(t))

    def loss(model, batch, t):
        return erm(model, blends[t], t)

    run.t = 0
    fit(run)
    assert_weights(run.live, plain_training(loss).state_dict())


@pytest.mark.parametrize("across", [True, False])
def test_the_contract(across):
    check_link("mixup", alpha=1.0, across=across)
