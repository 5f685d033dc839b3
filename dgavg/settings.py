"""Settings by name, checked against a signature: a misspelt or ill-typed one is an error."""

from __future__ import annotations

import collections.abc
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dgavg.errors import UserError, unknown


def fits(value: object, kind: Any) -> bool:
    """Whether `value` is of the annotated type `kind`; an int is a float, a bool is neither.

    >>> fits(1, float), fits(True, int), fits([0, 15], list[int]), fits("a", int | None)
    (True, False, True, False)
    """
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, k) for k in args)
    if origin is Literal:
        return value in args
    if kind is None or kind is types.NoneType:
        return value is None
    if origin is collections.abc.Callable:
        return callable(value)
    if origin in (list, tuple, collections.abc.Sequence):
        items = (
            isinstance(value, collections.abc.Sequence)
            and not isinstance(value, str)
            and all(fits(v, args[0]) for v in value)
        )
        return items if args else isinstance(value, collections.abc.Sequence)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or kind)


def kind_name(kind: Any) -> str:
    """A type as a user would write it: `float`, `list[int]`, `int | None`."""
    if get_origin(kind) is Literal:
        return " | ".join(map(str, get_args(kind)))
    if get_origin(kind) in (Union, types.UnionType):
        return " | ".join(kind_name(k) for k in get_args(kind))
    if get_origin(kind) is collections.abc.Callable:
        return "a function of the step"
    if kind is types.NoneType:
        return "null"
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)


def check_type(value: object, kind: Any, name: str) -> None:
    """Raise `UserError` unless `value` is of the annotated type `kind`."""
    if not fits(value, kind):
        raise UserError(f"{name}={value!r} is not {kind_name(kind)}")


def keyword_settings(function: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """The keyword-only parameters of `function`: name to (annotation, default or `empty`)."""
    hints = get_type_hints(function)
    return {
        p.name: (hints.get(p.name, Any), p.default)
        for p in inspect.signature(function).parameters.values()
        if p.kind is p.KEYWORD_ONLY
    }


def check_settings(function: Callable[..., Any], settings: Mapping[str, Any], where: str) -> None:
    """Check names and types of `settings` against the keyword-only parameters of `function`.

    Raises `UserError` for a name that does not exist (with the nearest that does), for a value of
    another type, and for one that is required and absent. `where` is the prefix a user writes,
    such as "data".
    """
    known = keyword_settings(function)
    for name, value in settings.items():
        if name not in known:
            raise unknown("setting", name, known, where)
        check_type(value, known[name][0], f"{where}.{name}")
    for name, (kind, default) in known.items():
        if default is inspect.Parameter.empty and settings.get(name) is None:
            raise UserError(f"{where}.{name} is missing: set it to {kind_name(kind)}")
