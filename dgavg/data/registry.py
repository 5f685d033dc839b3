"""Data sets by name: `load("folder", root="PACS")`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from dgavg.data.domains import DomainDataset
from dgavg.errors import require, unknown
from dgavg.settings import check_settings

DATASETS: dict[str, Callable[..., DomainDataset]] = {}
"""Every loader by its name. The first line of a loader's docstring is its summary."""

Loader = TypeVar("Loader", bound=Callable[..., DomainDataset])


def dataset(name: str) -> Callable[[Loader], Loader]:
    """Register a loader: a function of keyword-only, annotated settings that gives a data set."""

    def register(loader: Loader) -> Loader:
        require(name not in DATASETS, f"data set {name!r} is registered already; choose a new name")
        DATASETS[name] = loader
        return loader

    return register


def load(name: str, **settings: Any) -> DomainDataset:
    """Load the data set called `name`.

    Raises `UserError` for an unknown name, an unknown or missing setting, a value of the wrong
    type, and whatever the loader itself refuses.
    """
    if name not in DATASETS:
        raise unknown("data set", name, DATASETS)
    check_settings(DATASETS[name], settings, "data")
    return DATASETS[name](**settings)
