"""Errors that a user can mend: one line of what is wrong, where, and what to write instead."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A mistake in what the user asked for; the command line prints it and exits with 2."""


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def unknown(kind: str, name: object, known: Iterable[object], where: str = "") -> UserError:
    """The error for a name that does not exist, with the nearest one that does.

    >>> print(unknown("trainer", "sward", ["swa", "swad"]))
    no trainer 'sward'; did you mean 'swad'? Known: swa, swad
    """
    names = [str(k) for k in known]
    near = get_close_matches(str(name).lower(), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    place = f" in {where}" if where else ""
    return UserError(f"no {kind} {str(name)!r}{place}; {hint}Known: {', '.join(names) or 'none'}")
