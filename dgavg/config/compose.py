"""Composing the configuration in Python, and finding `conf/`."""

from __future__ import annotations

from collections.abc import Iterable
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

PACKAGE = Path(dgavg.__file__).parent
INSIDE = PACKAGE / "conf"  # in an installed wheel
CONF = INSIDE if INSIDE.is_dir() else PACKAGE.parent / "conf"


def register() -> None:
    """Tell Hydra the types of the configuration and where chains come from."""
    ConfigStore.instance().store(name="dgavg_settings", node=Settings)
    chain_source.register()


def compose(overrides: Iterable[str] = ()) -> DictConfig:
    """The configuration that `dgavg OVERRIDES` would run with.

    Raises what Hydra raises; `dgavg.config.explain` turns that into one line.
    """
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="dgavg"):
        return hydra_compose("train", overrides=list(overrides))


def plain(config: DictConfig) -> dict[str, Any]:
    """The configuration as plain dicts, lists and numbers, interpolations resolved."""
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
