"""What protocols pin, for which data set, and what is said of a run that departs from them."""

from __future__ import annotations

import pytest

from dgavg.benchmark.search import grid_size, names
from dgavg.config import compose, plain
from dgavg.config.protocols import changed, pinned

PUBLISHED = ("domainbed2020", "domainbed2024", "swad", "eoa", "diwa")


def composed(*overrides):
    return plain(compose(overrides))


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("data", ["digits_rotated", "colored_mnist"])
def test_what_a_protocol_pins_is_what_is_composed(name, data):
    settings = composed(f"protocol={name}", f"data={data}")
    for key, value in pinned(name, data).items():
        group, _, setting = key.partition(".")
        assert settings[group][setting] == value, key
    assert changed(settings) == []


@pytest.mark.parametrize(
    ("name", "steps", "often", "rarely"),
    [("domainbed2020", 5001, 300, 5001), ("swad", 5001, 100, 15001), ("eoa", 5001, 300, 15001)],
)
def test_steps_and_evaluations_depend_on_the_data_set(name, steps, often, rarely):
    assert pinned(name, "pacs")["protocol.steps"] == steps
    assert pinned(name, "pacs")["protocol.eval_every"] == often
    assert pinned(name, "domainnet")["protocol.steps"] == rarely


def test_mnist_has_its_own_rate_batches_and_no_augmentation():
    pins = pinned("domainbed2020", "rotated_mnist")
    assert [pins[k] for k in ("optimizer.lr", "protocol.batch_size", "protocol.augment")] == [
        *(1e-3, 64, "none")
    ]


def test_the_backbone_of_2024_is_another_one():
    old, new = (pinned(f"domainbed{year}", "pacs") for year in (2020, 2024))
    assert (old["model.weights"], old["model.freeze_bn"]) == ("IMAGENET1K_V1", True)
    assert (new["model.weights"], new["model.freeze_bn"]) == ("augmix", False)


def test_a_departure_is_named_and_what_the_protocol_leaves_open_is_none():
    settings = composed(
        "protocol=domainbed2020",
        "model=cnn",
        "~model.weights",
        "optimizer.lr=1e-3",
        "optimizer.beta1=0.5",
        "protocol.steps=5",
    )
    assert changed(settings) == [
        *("protocol.steps=5", "model.weights=None", "model.name=cnn", "optimizer.lr=0.001")
    ]


@pytest.mark.parametrize("name", ["quick", "ermpp", "a_name_of_my_own"])
def test_a_protocol_that_pins_no_more_than_itself_has_no_departures(name):
    assert changed(composed(f"protocol.name={name}", "protocol.steps=7")) == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_has_a_search_space_that_is_one(name):
    space = composed(f"protocol={name}")["search"]
    found = names(space, data="pacs", links=["irm", "basic"])
    assert set(found) >= {"optimizer.lr", "optimizer.weight_decay", "model.dropout"}
    assert ("trainer.irm.weight" in found) == (name != "swad")
    if name == "swad":
        assert grid_size(space) == 18


def test_mixup_is_drawn_as_in_its_time():
    ranges = [
        composed(f"protocol=domainbed{year}")["search"]["trainer.mixup.alpha"]["log10"]
        for year in (2020, 2024)
    ]
    assert ranges == [[-1, -1], [-1, 1]]


def test_soups_of_diwa_share_their_start():
    assert composed("protocol=diwa")["init_seed"] == 0
    assert composed("protocol=diwa", "init_seed=3")["init_seed"] == 3
