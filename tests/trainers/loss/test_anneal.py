"""What IRM and VREx share: the jump of the weight, and settings that are refused."""

from __future__ import annotations

import math

import pytest

from dgavg import UserError, chain, fit
from dgavg.testing import toy_run

BOTH = pytest.mark.parametrize("name", ["irm", "vrex"])


@BOTH
def test_moments_are_reset_at_anneal_and_at_no_other_step(name):
    run, counts = toy_run(f"{name}_basic", {name: {"anneal": 4}}), []
    for t in range(8):
        run.step(run.batches(t))
        run.t += 1
        run.tap("after_step")
        counts.append(len(run.optimizer.state))
    assert [count > 0 for count in counts] == [t + 1 != 4 for t in range(8)]


@BOTH
@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_is_no_finite_number_from_0_on_is_refused(name, weight):
    with pytest.raises(UserError, match=rf"trainer\.{name}\.weight=.*: a finite number from 0 on"):
        chain(f"{name}_basic", **{name: {"weight": weight}})


@BOTH
def test_a_negative_anneal_is_refused(name):
    with pytest.raises(UserError, match=rf"trainer\.{name}\.anneal=-1\.0: a number from 0 on"):
        chain(f"{name}_basic", **{name: {"anneal": -1}})


@BOTH
def test_a_weight_that_would_never_act_is_refused(name):
    with pytest.raises(UserError, match=rf"trainer\.{name}\.anneal=500 is past the end"):
        toy_run(f"{name}_basic")


@BOTH
def test_an_anneal_below_1_is_a_share_of_the_run(name):
    run = toy_run(f"{name}_basic", {name: {"anneal": 0.25}})
    assert run.trainer.jump == 3


@pytest.mark.parametrize("name", ["irm", "vrex", "iberm", "fishr", "ibirm"])
def test_an_infinite_anneal_is_never_and_says_so_by_itself(name):
    """What a search draws past the end of a run: weight and optimizer stay as they begin."""
    settings = {"anneal": math.inf} | ({"irm_anneal": math.inf} if name == "ibirm" else {})
    weak, strong = (
        toy_run(f"{name}_basic", {name: settings | {"weight": weight}}) for weight in (0.0, 1e6)
    )
    fit(weak), fit(strong)
    assert all(weak.live[k].equal(v) for k, v in strong.live.items())
    assert len(strong.optimizer.state) > 0
