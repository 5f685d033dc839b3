"""What a protocol pins beside its own settings, and where a run departs from that."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dgavg.config.compose import CONF, register

GROUPS = ("protocol", "model", "optimizer", "data")


def pinned(name: str, data: str) -> dict[str, Any]:
    """What protocol `name` sets for data set `data`, by dotted name.

    Empty for one without a file, or whose file pins nothing beside `protocol`.
    """
    path = Path(CONF) / "protocol" / f"{name}.yaml"
    if not path.is_file() or not path.read_text(encoding="utf-8").startswith("# @package _global_"):
        return {}
    register()
    raw: Any = OmegaConf.load(path)
    chosen = [entry for entry in raw.get("defaults", []) if isinstance(entry, DictConfig)]
    config = OmegaConf.merge(
        {group: raw[group] for group in GROUPS if group in raw}, {"data": {"name": data}}
    )
    for entry in chosen:
        for group, choice in entry.items():
            part = str(group).removeprefix("override").strip().lstrip("/")
            if part in GROUPS:
                config = OmegaConf.merge(config, {part: {"name": choice}})
    found: Any = OmegaConf.to_container(config, resolve=True)
    del found["data"]["name"]
    return {f"{g}.{k}": v for g, settings in found.items() for k, v in settings.items()}


def changed(settings: Mapping[str, Any]) -> list[str]:
    """The pinned settings that are other than their protocol says: `optimizer.lr=0.001`."""
    pins = pinned(settings["protocol"]["name"], settings["data"]["name"])
    found = []
    for key, wanted in pins.items():
        group, _, name = key.partition(".")
        actual = settings[group].get(name)
        if actual != wanted:
            found.append(f"{key}={actual}")
    return found
