"""Settings by name, checked against a signature: a misspelt or ill-typed one is an error."""

from __future__ import annotations

import collections.abc
import inspect
import os
import types
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dgavg.errors import UserError, unknown

_WORDS = {
    int: "an integer",
    float: "a number",
    str: "a text",
    bool: "true or false",
    types.NoneType: "null",
}


def fits(value: object, kind: Any) -> bool:
    """Whether `value` is of the annotated type `kind`.

    An int is a float, a path a text, any sequence but a text a list or tuple; a bool is no number.

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
    if origin is collections.abc.Callable:
        return callable(value)
    if origin in (list, tuple, collections.abc.Sequence):
        listed = isinstance(value, collections.abc.Sequence) and not isinstance(value, str | bytes)
        return listed and all(fits(v, args[0]) for v in value)  # type: ignore[attr-defined]
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    return isinstance(value, str | os.PathLike if kind is str else origin or kind)


def words(kind: Any) -> str:
    """A type in plain words.

    >>> words(int | None), words(list[float])
    ('an integer or null', 'a list, each item a number')
    """
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(words(k) for k in args)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is collections.abc.Callable:
        return "a function of the step"
    if origin in (list, tuple, collections.abc.Sequence):
        return f"a list, each item {words(args[0])}"
    return _WORDS.get(kind, getattr(kind, "__name__", str(kind)))


def check_type(value: object, kind: Any, name: str) -> None:
    """Raise `UserError` unless `value` is of the annotated type `kind`."""
    if not fits(value, kind):
        raise UserError(f"{name}={value!r} must be {words(kind)}, not {type(value).__name__}")


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
            raise UserError(f"{where}.{name} is missing: set it to {words(kind)}")
