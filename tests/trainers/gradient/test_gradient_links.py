"""What every link of the gradient plane keeps: the contract, soft labels, order across planes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from links import ACTING
from plain import run_of, trained

from dgavg.testing import check_link
from dgavg.testing.contract import same

NAMES = ("gsam", "sagm", "mldg", "andmask", "sandmask", "iga", "fish", "pcgrad")
LINKS = pytest.mark.parametrize("name", NAMES)


@LINKS
def test_the_contract(name):
    check_link(name, **ACTING[name])


@LINKS
def test_labels_that_are_probabilities_train_as_those_that_are_not(name):
    found = []
    for soft in (False, True):
        run = run_of(f"{name}_basic", {name: ACTING[name]})
        batch = run.batches(0)
        if soft:
            batch = replace(batch, y=F.one_hot(batch.y, 3).float())
        run.step(batch)
        found.append(torch.cat([p.detach().flatten() for p in run.parameters]))
    torch.testing.assert_close(*found)


@LINKS
@pytest.mark.parametrize("other", ["irm", "mixup"])
def test_order_across_planes_makes_no_difference(name, other):
    if (name, other) in {("iga", "irm"), ("fish", "mixup")}:
        pytest.skip("both add a term: their order is that of a sum; or refused")
    settings = {name: ACTING[name], "irm": {"weight": 5.0, "anneal": 0}, "mixup": {"alpha": 1.0}}
    found = [
        trained(spec, {k: settings[k] for k in (name, other)}).live
        for spec in (f"{name}_{other}_basic", f"{other}_{name}_basic")
    ]
    assert same(*found)


PAIRS = [
    ("andmask", "gsam"),
    ("gsam", "pcgrad"),
    ("sagm", "sam"),
    ("mldg", "sam"),
    ("fish", "gsam"),
]


@pytest.mark.parametrize(("outer", "inner"), PAIRS)
def test_gradient_links_act_inside_each_other(outer, inner):
    settings = {**ACTING, "sam": {"rho": 0.5}}
    both = trained(f"{outer}_{inner}_basic", {k: settings[k] for k in (outer, inner)}).live
    assert all(v.isfinite().all() for v in both.values())
    for one in (outer, inner):
        assert not same(both, trained(f"{one}_basic", {one: settings[one]}).live)
