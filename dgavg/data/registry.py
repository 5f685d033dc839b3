"""Data sets by name: `load("folder", root="PACS")`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from inspect import Parameter, signature
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from dgavg.data.domains import DomainDataset
from dgavg.errors import UserError, require, unknown

DATASETS: dict[str, Callable[..., DomainDataset]] = {}
"""Every loader by its name. The first line of a loader's docstring is its summary."""

Loader = TypeVar("Loader", bound=Callable[..., DomainDataset])

_WORDS = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}


def dataset(name: str) -> Callable[[Loader], Loader]:
    """Register a loader: a function of keyword-only, annotated settings that gives a data set."""

    def register(loader: Loader) -> Loader:
        require(name not in DATASETS, f"data set {name!r} is registered already; choose a new name")
        DATASETS[name] = loader
        return loader

    return register


def load(name: str, /, **settings: Any) -> DomainDataset:
    """Load the data set called `name`.

    Settings are checked against the loader's annotations: an int serves for a float, any sequence
    but a text for a list or tuple, a path object for a text, and None where None is allowed.

    Raises `UserError` for an unknown name, an unknown or missing setting, a value of the wrong
    type, and whatever the loader itself refuses.
    """
    if name not in DATASETS:
        raise unknown("data set", name, DATASETS)
    loader = DATASETS[name]
    parameters, kinds = signature(loader).parameters, get_type_hints(loader)
    given = {}
    for key, value in settings.items():
        if key not in parameters:
            raise unknown("setting", key, parameters, f"data set {name!r}")
        given[key] = _typed(value, kinds.get(key, Any), f"data.{key}={value!r} of {name!r}")
    for key, parameter in parameters.items():
        require(
            key in given or parameter.default is not Parameter.empty,
            f"data set {name!r} needs the setting {key!r}: write data.{key}=...",
        )
    return loader(**given)


def _typed(value: Any, kind: Any, what: str) -> Any:
    """`value` as the type `kind`, or a `UserError` that begins with `what`."""
    fits, result = _fit(value, kind)
    if not fits:
        raise UserError(f"{what} must be {_words(kind)}, not {type(value).__name__}")
    return result


def _fit(value: Any, kind: Any) -> tuple[bool, Any]:
    """Whether `value` may stand where `kind` is annotated, and what to pass for it."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return next((fit for fit in (_fit(value, arg) for arg in args) if fit[0]), (False, None))
    if origin in (list, tuple, Sequence):
        if isinstance(value, str | bytes) or not isinstance(value, Sequence):
            return False, None
        items = [_fit(item, args[0]) for item in value]
        made = [item for _, item in items]
        return all(fits for fits, _ in items), made if origin is list else tuple(made)
    if kind is NoneType:
        return value is None, None
    if kind is str and isinstance(value, os.PathLike):
        return True, os.fspath(value)
    if kind in (int, float):
        right = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
        return right, kind(value) if right else None
    return not isinstance(kind, type) or isinstance(value, kind), value


def _words(kind: Any) -> str:
    """A type in plain words: `an integer or null`."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(_words(arg) for arg in args)
    if origin in (list, tuple, Sequence):
        return f"a list, each item {_words(args[0])}"
    return "null" if kind is NoneType else _WORDS.get(kind, getattr(kind, "__name__", str(kind)))
