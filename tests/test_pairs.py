"""A chain does what its name says: every ordered pair of links, and the order across planes."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from links import ACTING, NEUTRAL, SHADOWS

from dgavg import Trainer, UserError, fit
from dgavg.chain import chain, find_trainer, known_trainers
from dgavg.matrix import page, refusal
from dgavg.testing import check_reentrant, toy_model, toy_run
from dgavg.testing.contract import same
from dgavg.trainers import Basic

LINKS = [name for name in ACTING if name != "basic"]
PAIRS = list(permutations(LINKS, 2))
LEGAL = [(a, b) for a, b in PAIRS if not refusal(a, b)]
ILLEGAL = [pair for pair in PAIRS if pair not in LEGAL]
RESUMED = 7  # a step between two evaluations and two epochs


def run_of(spec, **changed):
    names = [k for k in ACTING if k in spec.split("_")]
    return toy_run(spec, {k: {**ACTING[k], **changed.get(k, {})} for k in names})


@dataclass(frozen=True, eq=False)
class Ended:
    """What a run left, and what it would be resumed from."""

    state: dict[str, Any]
    offered: dict[str, Any]
    moved: bool  # was a live tensor rebound?
    saved: bytes

    @property
    def live(self):
        return self.state["model"]


@cache
def trained(spec, off=""):
    """A run of `spec` to its end; with the link `off` switched off."""
    run, file = run_of(spec, **({off: NEUTRAL[off]} if off else {})), io.BytesIO()
    before = {k: v.data_ptr() for k, v in run.model.state_dict().items()}

    def save(run):
        if run.t == RESUMED:
            torch.save(run.state_dict(), file)

    fit(run, after_step=save)
    after = {k: v.data_ptr() for k, v in run.model.state_dict().items()}
    return Ended(run.state_dict(), run.candidates(), before != after, file.getvalue())


def wraps(link):
    """The planes that a link acts on, by the wraps it overrides."""
    cls = find_trainer(link)
    names = ("step", "prepare", "grad", "loss", "lr")
    return {name for name in names if getattr(cls, name) is not getattr(Trainer, name)}


def test_every_link_that_comes_with_dgavg_is_in_the_pairs():
    assert sorted(ACTING) == known_trainers()


@pytest.mark.parametrize(("outer", "inner"), LEGAL)
def test_a_legal_pair_acts_and_keeps_the_contract(outer, inner):
    spec = f"{outer}_{inner}_basic"
    run = trained(spec)
    assert all(torch.isfinite(v).all() for v in run.live.values() if v.is_floating_point())
    for link, other in ((outer, inner), (inner, outer)):
        without = trained(f"{other}_basic")
        if link in SHADOWS:
            assert same(run.live, without.live), f"{link} is a shadow but changed the training"
            offered = [c for k, c in run.offered.items() if k.startswith(link)]
            assert offered, f"{link} offers nothing"
            assert not any(same(dict(c.weights), run.live) for c in offered), (
                f"{link} did not average"
            )
        else:
            assert not same(run.live, without.live), f"{link} changed nothing in {spec}"
    start = toy_model().state_dict()
    if start.keys() <= run.live.keys():  # else a link changed the model
        assert not same(start, dict(run.live)), f"{spec} does not train"
        moved = [k for k, p in toy_model().named_parameters() if not p.equal(run.live[k])]
        assert len(moved) > 3, f"{spec} trains only {moved}"
    assert not run.moved, f"{spec}: live weights were rebound, not written in place"
    again = run_of(spec)
    again.load_state_dict(torch.load(io.BytesIO(run.saved), weights_only=True))
    fit(again)
    for part, mine in run.state.items():
        assert same(mine, again.state_dict()[part]), f"{spec}: {part} differs after a resume"
    if not wraps(outer) & wraps(inner):
        other = trained(f"{inner}_{outer}_basic") if (inner, outer) in LEGAL else run
        assert same(run.live, other.live), f"{spec}: the order across planes makes a difference"


@pytest.mark.parametrize(("outer", "inner"), ILLEGAL)
def test_an_illegal_pair_is_refused_for_a_reason_that_its_links_declare(outer, inner):
    one, other = (find_trainer(k)(Basic(), **ACTING[k]) for k in (outer, inner))
    with pytest.raises(UserError) as caught:
        chain(f"{outer}_{inner}_basic")
    if other.outermost:
        assert f"must come first: write {inner}_{outer}_basic" in str(caught.value)
    elif one.compares_gradients and other.compares_gradients:
        assert "each compare the domains' gradients" in str(caught.value)
    elif one.owns_step and other.owns_step:
        assert "each replace the step: choose one" in str(caught.value)
    else:
        splitter, fed = (one, other) if one.splits_domains else (other, one)
        assert splitter.splits_domains
        found = [
            f"{b.name!r} compares domains, but {a.name!r} feeds it one at a time"
            for a, b in ((splitter, fed), (fed, splitter))
            if a.splits_domains and b.min_domains > 1
        ]
        assert any(message in str(caught.value) for message in found)


@pytest.mark.parametrize("link", [k for k in LINKS if k not in SHADOWS])
def test_wraps_are_reentrant_under_a_link_that_calls_them_twice(link):
    spec = f"sam_{link}_basic" if link != "ma" else "ma_sam_basic"
    if link != "sam":
        check_reentrant(spec, {k: ACTING[k] for k in ("sam", link)})


@pytest.mark.parametrize("link", [k for k in NEUTRAL if k != "ma"])
def test_a_link_switched_off_is_basic(link):
    """To rounding: a penalty of weight 0 still adds zeros, in another order of sums."""
    off, basic = trained(f"{link}_basic", off=link), trained("basic")
    for name, tensor in basic.live.items():
        torch.testing.assert_close(off.live[name], tensor, rtol=1e-4, atol=1e-5)


def test_shadows_leave_the_run_alone_to_the_bit():
    with_shadows, without = trained("ema_swa_sma_irm_basic"), trained("irm_basic")
    assert same(with_shadows.live, without.live)
    assert same(with_shadows.state["optimizer"], without.state["optimizer"])


def test_the_page_of_pairs_is_the_one_in_the_zoo():
    shown = Path(__file__).parents[1] / "zoo/pairs.md"
    assert shown.read_text() == page(), "write it anew: dgavg list pairs > zoo/pairs.md"
