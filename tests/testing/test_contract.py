"""The contract finds each kind of link that breaks it, and passes the ones that keep it."""

from __future__ import annotations

import pytest
import torch
from links import ACTING, SHADOWS
from torch import nn

from dgavg import Trainer, state, trainer
from dgavg.testing import check_in_place, check_link, check_reentrant, check_resume, is_shadow


@pytest.mark.parametrize("name", ACTING)
def test_every_link_keeps_the_contract(name):
    check_link(name, **ACTING[name])


@pytest.mark.parametrize("name", [n for n in ACTING if n != "basic"])
def test_shadows_are_told_from_links_that_train(name):
    assert is_shadow(f"{name}_basic", {name: ACTING[name]}) == (name in SHADOWS)


def test_a_link_that_rebinds_live_weights_is_found():
    @trainer("rebinds", outermost=True)
    class Rebinds(Trainer):
        """Replaces a parameter's memory."""

        def after_step(self, run):
            weight = run.model.classifier.weight
            weight.data = weight.data.clone()

    with pytest.raises(AssertionError, match="rebound"):
        check_in_place("rebinds_basic", {})


def test_a_wrap_that_moves_a_buffer_in_training_is_found():
    class Counting(nn.Module):
        """Counts its passes while it trains."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.register_buffer("passes", torch.zeros(()))

        def forward(self, features):
            self.passes += self.training
            return self.inner(features)

    @trainer("passes")
    class Passes(Trainer):
        """Has the classifier count."""

        def adapt(self, model, domains):
            model.classifier = Counting(model.classifier)

    with pytest.raises(AssertionError, match=r"wrap changed the buffer model\.classifier\.passes"):
        check_reentrant("passes_basic", {})


def test_a_draw_of_its_own_in_training_is_found():
    @trainer("draws")
    class Draws(Trainer):
        """Adds new noise in every pass of a model in training mode."""

        def loss(self, run, batch):
            out = self.inner.loss(run, batch)
            if run.model.training:
                out.terms["draws"] = (out.logits * torch.randn_like(out.logits)).mean()
            return out

    with pytest.raises(AssertionError, match="gives another gradient"):
        check_reentrant("draws_basic", {})


def test_a_wrap_that_advances_state_is_found():
    @trainer("counts")
    class Counts(Trainer):
        """Counts in a wrap."""

        calls: int = state(int)

        def loss(self, run, batch):
            self.calls += 1
            return self.inner.loss(run, batch)

    with pytest.raises(AssertionError, match="taps own time"):
        check_reentrant("counts_basic", {})


def test_a_wrap_that_draws_anew_is_found():
    @trainer("draws")
    class Draws(Trainer):
        """Draws from the global generator in a wrap."""

        def loss(self, run, batch):
            out = self.inner.loss(run, batch)
            out.terms["draws"] = out.logits.square().mean() * torch.rand(())
            return out

    with pytest.raises(AssertionError, match="another gradient"):
        check_reentrant("draws_basic", {})


def test_state_that_is_not_saved_is_found():
    hidden = {"steps": 0}

    @trainer("hides")
    class Hides(Trainer):
        """Keeps state where no checkpoint sees it."""

        def after_step(self, run):
            hidden["steps"] += 1

        def lr(self, run):
            return 0.001 * (1 + hidden["steps"])

    with pytest.raises(AssertionError, match="differs after a resume"):
        check_resume("hides_basic", {})


def test_a_link_cannot_hide_state_in_an_undeclared_attribute():
    @trainer("undeclared")
    class Undeclared(Trainer):
        """Writes an attribute that no field declares."""

        def setup(self, run):
            self.count = 0

    with pytest.raises(AttributeError, match="count"):
        check_link("undeclared")
