"""The named recipes and experiments that come with dgavg."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from dgavg.chain import chain, settings_of
from dgavg.config import CONF, compose, plain


def names(group):
    return sorted(p.stem for p in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize("name", names("trainer"))
def test_a_named_recipe_is_a_chain_with_typed_settings(name):
    links = plain(compose([f"trainer={name}"]))["trainer"]
    head = chain("_".join(links), **links)
    assert settings_of(head) == links


def test_domainlabs_average_counts_epochs_from_1():
    links = plain(compose(["trainer=domainlab_ma"]))["trainer"]
    assert list(links) == ["ma", "basic"]
    assert links["ma"]["first_epoch"] == 1


@pytest.mark.parametrize("name", names("experiment"))
def test_an_experiment_composes_and_changes_something(name):
    assert plain(compose([f"experiment={name}"])) != plain(compose())


def test_the_calm_experiment_is_what_the_readme_says():
    found = plain(compose(["experiment=calm", "seeds=[0]"]))
    assert found["model"]["batchnorm"] is False
    assert (found["optimizer"]["lr"], found["protocol"]["batch_size"]) == (1e-3, 64)
    assert found["seeds"] == [0]


ZOO = sorted((Path(__file__).parents[2] / "zoo").glob("*.yaml"))


@pytest.mark.parametrize("path", ZOO, ids=lambda path: path.stem)
def test_a_recipe_of_the_zoo_has_a_command_that_composes_and_measured_figures(path):
    recipe = yaml.safe_load(path.read_text())
    program, *words = shlex.split(recipe["command"])
    assert program == "dgavg"
    first = [w.split(",")[0] if w.startswith("trainer=") else w for w in words if w != "-m"]
    links = plain(compose(first))["trainer"]
    assert "_".join(links) in recipe["measured"]
    assert recipe["measured_on"]
