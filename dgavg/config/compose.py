"""Composing the configuration in Python, and finding `conf/`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

import dgavg
from dgavg.config import chain_source
from dgavg.config.schema import Settings
from dgavg.errors import UserError, require, unknown

PACKAGE = Path(dgavg.__file__).parent
INSIDE = PACKAGE / "conf"  # in an installed wheel
CONF = INSIDE if INSIDE.is_dir() else PACKAGE.parent / "conf"


def by_data(default: Any, others: Mapping[str, Any], *, _root_: DictConfig) -> Any:
    """In a YAML file `${by_data:300,{domainnet:1000}}`: one value, others for some data sets."""
    return others.get(str(_root_.data.name), default)


def register() -> None:
    """Tell Hydra the types of the configuration and where chains come from."""
    ConfigStore.instance().store(name="dgavg_settings", node=Settings)
    chain_source.register()
    OmegaConf.register_new_resolver("by_data", by_data, replace=True)


def compose(overrides: Iterable[str] = ()) -> DictConfig:
    """The configuration that `dgavg OVERRIDES` would run with.

    Raises what Hydra raises; `dgavg.config.explain` turns that into one line.
    """
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="dgavg"):
        return hydra_compose("train", overrides=replacing(overrides))


def replacing(overrides: Iterable[str]) -> list[str]:
    """Overrides in which a schedule takes the place of another one, with which it would be merged.

    >>> replacing(["trainer.irm.weight={linear:{to:3}}", "seeds=[0]"])
    ['trainer.irm.weight=null', 'trainer.irm.weight={linear:{to:3}}', 'seeds=[0]']
    """
    found = []
    for word in overrides:
        key, _, value = word.partition("=")
        if key.startswith("trainer.") and key.count(".") == 2 and value.startswith("{"):
            found.append(f"{key}=null")
        found.append(word)
    return found


def plain(config: DictConfig) -> dict[str, Any]:
    """The configuration as plain dicts, lists and numbers, interpolations resolved.

    Raises `UserError` for a setting that was added to `Settings` or deleted from it.
    """
    found: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    known = [f.name for f in fields(Settings)]
    for key in found:
        if key not in known:
            raise unknown("setting", key, known)
    for key in known:
        require(key in found, f"{key} is missing: write {key}=...")
    for group in ("data", "model", "optimizer"):
        if "name" not in found[group]:
            raise UserError(f"{group}.name is missing: write {group}=...")
    require(bool(found["trainer"]), "trainer has no link: write trainer=..., such as ema_basic")
    return found  # type: ignore[no-any-return]
