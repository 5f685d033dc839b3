"""The decorator and the base class of a link."""

from __future__ import annotations

import pytest
import torch

from dgavg import Trainer, UserError, state, trainer
from dgavg.trainers import EMA, IRM, MA, Basic


def test_a_link_is_slotted_and_knows_its_name_and_traits():
    @trainer("mine", min_domains=2)
    class Mine(Trainer):
        """A link."""

        weight: float = 1.0
        count: int = state(int)

    link = Mine(Basic(), weight=2)
    assert (link.name, link.min_domains) == ("mine", 2)
    assert link.settings() == {"weight": 2.0}
    assert link.state_dict() == {"count": 0}
    with pytest.raises(AttributeError):
        link.other = 1


@pytest.mark.parametrize("name", ["Mine", "my_link", "", "mein-link", "ä"])
def test_a_name_that_no_chain_could_spell_is_refused(name):
    with pytest.raises(UserError, match="lower-case letters and digits only"):
        trainer(name)


def test_a_name_that_is_taken_is_refused():
    with pytest.raises(UserError, match=r"'ema' is taken by dgavg\.trainers\.weights\.ema"):

        @trainer("ema")
        class Other(Trainer):
            """Another one."""


def test_links_are_final():
    with pytest.raises(UserError, match="links are final"):

        @trainer("child")
        class Child(IRM):
            """Inherits a link."""


def test_an_unknown_trait_is_refused():
    with pytest.raises(UserError, match="no trait 'outermots'"):

        @trainer("mine", outermots=True)
        class Mine(Trainer):
            """A link."""


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: IRM(Basic(), weight="ten"),
            "irm.weight='ten' must be a number, not str",
        ),
        (lambda: EMA(Basic(), every=1.5), "ema.every=1.5 must be an integer, not float"),
        (lambda: EMA(Basic(), every=True), "ema.every=True must be an integer, not bool"),
        (lambda: EMA(Basic(), decay=1.0), r"ema.decay=1.0: a number in \[0, 1\)"),
        (lambda: MA(EMA), "the first argument is the trainer to decorate"),
        (lambda: MA("ema"), "the first argument is the trainer to decorate"),
    ],
)
def test_settings_are_checked_when_a_link_is_made(build, message):
    with pytest.raises(UserError, match=message):
        build()


def test_iterating_gives_the_links_outermost_first():
    assert [k.name for k in MA(EMA(Basic()))] == ["ma", "ema", "basic"]


def test_one_and_one_point_zero_are_one_setting():
    assert repr(IRM(Basic(), weight=10).settings()) == repr(IRM(Basic(), weight=10.0).settings())


def test_state_of_a_tensor_is_restored_in_place():
    @trainer("holds")
    class Holds(Trainer):
        """Holds a tensor."""

        q: torch.Tensor = state(lambda: torch.zeros(2))

    link = Holds(Basic())
    before = link.q.data_ptr()
    link.load_state_dict({"q": torch.tensor([1.0, 2.0])})
    assert link.q.tolist() == [1.0, 2.0]
    assert link.q.data_ptr() == before


def test_the_state_of_another_version_of_a_link_is_refused():
    with pytest.raises(UserError, match=r"the state of 'ma' has \['count'\]"):
        MA(Basic()).load_state_dict({"count": 1})
