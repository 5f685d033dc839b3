"""Recipes: each composes and says where its numbers are from; `zoo/README.md` is their table."""

from __future__ import annotations

import re

import pytest
import yaml
from omegaconf import OmegaConf

from dgavg.benchmark.checks import check_choices
from dgavg.benchmark.zoo import page, recipes
from dgavg.chain import chain
from dgavg.config import compose, explained, plain
from dgavg.config.protocols import changed
from dgavg.config.zoo_source import ZOO, recipe_names
from dgavg.errors import UserError

NEEDED = {"pacs_features/policies": ["data.file=x.npz"]}


def composed(name, *more):
    return plain(compose([f"+zoo={name}", *NEEDED.get(name, ()), *more]))


PUBLISHED = [r for r in recipes() if "published" in r.about]
COMPOSED = [n for n in recipe_names() if n.startswith("pacs/")] + [
    r.name for r in recipes() if r not in PUBLISHED and not r.name.startswith("pacs/")
]


def test_a_method_is_the_same_on_every_benchmark():
    """So it is enough to compose those of one."""
    for method in {r.name.partition("/")[2] for r in PUBLISHED}:
        same = {}
        for recipe in PUBLISHED:
            benchmark, _, name = recipe.name.partition("/")
            if name == method:
                settings = yaml.safe_load(recipe.text.replace(f" {benchmark}\n", " pacs\n"))
                settings.pop("zoo")
                if name not in ("arm", "swad", "swad_coral", "swad_miro"):  # MNIST, VLCS differ
                    same[benchmark] = settings
        assert all(settings == next(iter(same.values())) for settings in same.values())


@pytest.mark.parametrize("name", COMPOSED)
def test_a_recipe_composes_to_a_legal_run(name):
    settings = composed(name)
    links = settings["trainer"]
    chain("_".join(links), **links)
    check_choices(settings, settings["protocol"])
    if settings["protocol"]["name"] == "domainbed2020" and "arm" not in links:
        assert changed(settings) == []


@pytest.mark.parametrize("recipe", recipes(), ids=lambda r: r.name)
def test_a_recipe_names_its_source_and_its_numbers(recipe):
    about = recipe.about
    assert re.fullmatch(r"[^#].*\.", recipe.title)
    assert about.keys() <= {"paper", "published", "published_in", "then", "command", "measured"}
    assert "measured" in about
    if "published" in about:
        assert re.fullmatch(r"\d\d\.\d( ± \d+\.\d)?", str(about["published"]))
        assert about["paper"]
        assert about["published_in"]
    if about["measured"] is not None:
        assert about["measured"].keys() == {"short", "hardware", "date", "table"}
        assert f"+zoo={recipe.name}" in about["command"]


def leaves(settings, prefix=""):
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_a_recipe_overrides_only_what_it_changes():
    """No recipe repeats a value that would be there without it."""
    for recipe in (r for r in recipes() if r.name in COMPOSED):
        text = yaml.safe_load(recipe.text)
        own = {k: v for k, v in text.items() if k not in ("defaults", "zoo", "hydra")}
        groups = [
            f"{k.removeprefix('override /')}={v}"
            for entry in text.get("defaults", [])
            for k, v in entry.items()
        ]
        required = ["model.backbone=x"] if "model=timm" in groups else []
        before = plain(compose([*groups, *NEEDED.get(recipe.name, ()), *required]))
        for key, value in leaves(own):
            assert value != OmegaConf.select(OmegaConf.create(before), key), (recipe.name, key)


def test_further_settings_stand_over_a_recipe():
    settings = composed("vlcs/swad", "protocol.steps=7", "trainer.swad.n_converge=2")
    assert settings["trainer"]["swad"]["tolerance_ratio"] == 0.2
    assert settings["trainer"]["swad"]["n_converge"] == 2
    assert (settings["protocol"]["steps"], settings["protocol"]["name"]) == (7, "swad")
    assert changed(settings) == ["protocol.steps=7"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pacs/swat", r"no recipe 'pacs/swat'; did you mean 'pacs/swad'\? Known: pacs/arm, .*"),
        ("swad", r"no recipe 'swad'; did you mean '\w+/swad'\? Known: .*; dgavg list zoo has them"),
    ],
)
def test_a_recipe_that_is_not_there_is_one_line_with_the_nearest(name, message):
    with pytest.raises(UserError, match=message), explained():
        compose([f"+zoo={name}"])


def test_the_page_is_what_the_recipes_say():
    assert (ZOO / "README.md").read_text(encoding="utf-8") == page()
