"""A chain does what its name says: every ordered pair of links, and the order across planes."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from links import ACTING, NEUTRAL, SHADOWS

from dgavg import UserError, fit
from dgavg.chain import chain, known_trainers
from dgavg.testing import check_in_place, check_reentrant, check_resume, toy_run
from dgavg.testing.contract import same

LINKS = [name for name in ACTING if name != "basic"]
PAIRS = list(permutations(LINKS, 2))
LEGAL = [(a, b) for a, b in PAIRS if b != "ma"]


def trained(spec, **changed):
    run = toy_run(
        spec, {k: {**v, **changed.get(k, {})} for k, v in ACTING.items() if k in spec.split("_")}
    )
    fit(run)
    return run


def test_every_link_that_comes_with_dgavg_is_in_the_pairs():
    assert sorted(ACTING) == known_trainers()


@pytest.mark.parametrize(("outer", "inner"), PAIRS)
def test_a_pair_acts_or_is_refused(outer, inner):
    spec = f"{outer}_{inner}_basic"
    if inner == "ma":
        with pytest.raises(UserError, match=f"must come first: write ma_{outer}_basic"):
            chain(spec)
        return
    run = trained(spec)
    assert all(torch.isfinite(v).all() for v in run.live.values() if v.is_floating_point())
    for link, other in ((outer, inner), (inner, outer)):
        without = trained(f"{other}_basic")
        if link in SHADOWS:
            assert same(run.live, without.live), f"{link} is a shadow but changed the training"
            offered = [c for k, c in run.candidates().items() if k.startswith(link)]
            assert offered, f"{link} offers nothing"
            assert not any(same(dict(c.weights), run.live) for c in offered), (
                f"{link} did not average"
            )
        else:
            assert not same(run.live, without.live), f"{link} changed nothing in {spec}"
        if link in NEUTRAL:
            off = trained(spec, **{link: NEUTRAL[link]})
            assert not same(run.live, off.live), f"{link}: its setting changed nothing in {spec}"


@pytest.mark.parametrize(("outer", "inner"), LEGAL)
def test_a_pair_keeps_the_contract(outer, inner):
    spec = f"{outer}_{inner}_basic"
    check_in_place(spec, {k: ACTING[k] for k in (outer, inner)})
    check_reentrant(spec, {k: ACTING[k] for k in (outer, inner)})
    check_resume(spec, {k: ACTING[k] for k in (outer, inner)}, steps=(7,))


PLANES = {"irm": "loss", "vrex": "loss", "coral": "loss", "mixup": "batch", "sam": "gradient"}


@pytest.mark.parametrize(
    ("a", "b"), [(a, b) for a, b in permutations(PLANES, 2) if a < b and PLANES[a] != PLANES[b]]
)
def test_order_across_planes_makes_no_difference(a, b):
    assert same(trained(f"{a}_{b}_basic").live, trained(f"{b}_{a}_basic").live)


@pytest.mark.parametrize("link", [k for k in NEUTRAL if k != "ma"])
def test_a_link_switched_off_is_basic(link):
    """To rounding: a penalty of weight 0 still adds zeros, in another order of sums."""
    off, basic = trained(f"{link}_basic", **{link: NEUTRAL[link]}), trained("basic")
    for name, tensor in off.live.items():
        torch.testing.assert_close(tensor, basic.live[name], rtol=1e-4, atol=1e-5)


def test_shadows_leave_the_run_alone_to_the_bit():
    with_shadows, without = trained("ema_swa_sma_irm_basic"), trained("irm_basic")
    assert same(with_shadows.live, without.live)
    assert same(with_shadows.optimizer.state_dict(), without.optimizer.state_dict())
