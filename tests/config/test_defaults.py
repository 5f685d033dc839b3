"""Every default stands in one place, or a test here keeps its copies equal."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, asdict, fields
from functools import cache

import pytest
import yaml
from links import ACTING

from dgavg.chain import chain, find_trainer, settings_of
from dgavg.config import CONF, compose, plain
from dgavg.config.schema import ProtocolSettings, Settings, StoppingSettings
from dgavg.data import DATASETS
from dgavg.evaluation import Stopping
from dgavg.models import MODELS
from dgavg.optimizers import OPTIMIZERS
from dgavg.settings import fits, keyword_settings

REGISTRIES = {"data": DATASETS, "model": MODELS, "optimizer": OPTIMIZERS}
ENTRIES = [(group, name) for group, registry in REGISTRIES.items() for name in registry]
SCHEDULE = {"schedule": "constant", "warmup": 0, "clip": None}  # of any optimizer


@cache
def yaml_of(group, name):
    return plain(compose([f"{group}={name}", *_required(group, name)]))[group]


def _required(group, name):
    text = (CONF / group / f"{name}.yaml").read_text()
    return [f"{group}.{k}=x" for k, v in yaml.safe_load(text).items() if v == "???"]


def test_every_entry_has_a_file_and_every_file_an_entry():
    for group, registry in REGISTRIES.items():
        assert {p.stem for p in (CONF / group).glob("*.yaml")} == set(registry), group


@pytest.mark.parametrize(("group", "name"), ENTRIES)
def test_yaml_has_the_settings_of_the_signature_and_its_defaults(group, name):
    found = {k: v for k, v in yaml_of(group, name).items() if k != "name"}
    assert yaml_of(group, name)["name"] == name
    if group == "optimizer":
        assert {k: found.pop(k) for k in SCHEDULE} == SCHEDULE
        assert found.pop("lr") == 0.01  # the one that only conf/ has
    known = keyword_settings(REGISTRIES[group][name])
    known.pop("lr", None)
    assert list(found) == list(known)
    for key, (kind, default) in known.items():
        if default is inspect.Parameter.empty:
            assert found[key] == "x", f"{key} must be ??? in YAML"
        else:
            assert fits(found[key], kind), key
            wanted = list(default) if isinstance(default, tuple) else default
            assert found[key] == wanted, key


@pytest.mark.parametrize("name", sorted(ACTING.keys() - {"basic"}))
def test_the_settings_of_a_link_are_those_of_its_class(name):
    composed = plain(compose([f"trainer={name}_basic"]))["trainer"][name]
    assert composed == settings_of(chain(f"{name}_basic"))[name]
    declared = {f.name: f.default for f in fields(find_trainer(name)) if f.init}
    declared = {k: list(v) if isinstance(v, tuple) else v for k, v in declared.items()}
    declared.pop("inner")
    assert composed == declared


@pytest.mark.parametrize("schema", [Settings, ProtocolSettings, StoppingSettings])
def test_the_schema_has_types_and_no_values(schema):
    for f in fields(schema):
        assert f.default in ("???", MISSING), f.name


def test_stopping_has_one_default():
    assert plain(compose())["stopping"] == asdict(Stopping())


@pytest.mark.parametrize("path", sorted((CONF / "protocol").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_protocol_pins_everything_and_says_what_it_is(path):
    text = path.read_text()
    assert text.removeprefix("# @package _global_\n").startswith("# ")
    found = yaml.safe_load(text)
    found = found.get("protocol", found)
    wanted = [f.name for f in fields(ProtocolSettings)]
    assert sorted(found) == sorted(wanted)
    assert found["name"] == path.stem
