"""Search spaces: DomainBed's random draws, to the bit, and grids.

A space maps dotted settings to entries. An entry has one of these kinds:

- `log10: [a, b]` draws 10**u with u uniform over [a, b); `uniform: [a, b]` u itself;
- `int_log2: [a, b]`, `int_log10: [a, b]`, `int_uniform: [a, b]`: 2**u, 10**u, u, cut to integers;
  `ceil_log10: [a, b]`: the integer above 10**u;
- `choice: [...]` draws one of the values;
- `fixed: value` takes the value always;
- `grid: [...]` is an axis of a grid. A space has such entries (and fixed ones) alone, or none.

and may have these keys:

- `name`: what DomainBed calls the setting, from which its random numbers are made; needed by
  every kind that draws;
- `default`: its value in DomainBed's defaults, for `defaults`;
- `only: [links]`: the entry is there only where the chain has one of them. Entries under
  `trainer.LINK.` are there only where the chain has LINK, without saying so;
- `for: {NAME: {...}}`: for the data set or the link NAME, keys that stand instead of those above;
  the first NAME that fits counts, and may have a `for` of its own;
- `step: true`: the value is a step; one past the end of the run becomes infinity: never;
- `over: SETTING`: the draw is divided by the value of that setting, where it is drawn, too. So a
  factor follows from two values that are drawn each by itself.

Draws are those of DomainBed (Gulrajani and Lopez-Paz 2021, arXiv 2007.01434): with `s =
seed_hash(hparams_seed, trial_seed)`, a setting comes from `RandomState(seed_hash(s, name))`. So the
same `hparams_seed` means other values in each trial, and `hparams_seed` 0 means the defaults.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dgavg.data.published import plain
from dgavg.data.splits import seed_hash
from dgavg.errors import require, unknown

Space = Mapping[str, Mapping[str, Any]]
Draw = Callable[[np.random.RandomState, Any], Any]

RANDOM: dict[str, Draw] = {
    "log10": lambda r, v: 10 ** r.uniform(*v),
    "uniform": lambda r, v: r.uniform(*v),
    "int_log2": lambda r, v: int(2 ** r.uniform(*v)),
    "int_log10": lambda r, v: int(10 ** r.uniform(*v)),
    "int_uniform": lambda r, v: int(r.uniform(*v)),
    "ceil_log10": lambda r, v: math.ceil(10 ** r.uniform(*v)),
    "choice": lambda r, v: v[r.choice(len(v))],
}
KINDS = (*RANDOM, "fixed", "grid")
KEYS = (*KINDS, "name", "default", "only", "for", "step", "over")


def draw(
    space: Space,
    hparams_seed: int,
    trial_seed: int,
    *,
    data: str,
    links: Sequence[str],
    steps: int | None = None,
) -> dict[str, Any]:
    """The settings of one draw for a data set and a chain of links; none for `hparams_seed` 0.

    `steps` is how many a run has, if steps may be past its end.

    Raises `UserError` for a space that is no space, or a grid.
    """
    entries = _entries(space, data, links)
    axes = [setting for setting, entry in entries.items() if "grid" in entry]
    require(not axes, f"search.{axes[0] if axes else ''} is an axis of a grid: take it by index")
    if hparams_seed == 0:
        return {}
    seed = seed_hash(hparams_seed, trial_seed)
    found = {setting: _value(entry, seed) for setting, entry in entries.items()}
    for setting, entry in entries.items():
        if entry.get("step") and steps is not None and found[setting] >= steps:
            found[setting] = math.inf
    factors = {
        setting: found[setting] / found[entry["over"]]
        for setting, entry in entries.items()
        if "over" in entry
    }
    return found | factors


def names(space: Space, *, data: str, links: Sequence[str]) -> tuple[str, ...]:
    """The settings that `draw` or `grid` gives for a data set and a chain of links."""
    return tuple(_entries(space, data, links))


def defaults(space: Space, *, data: str, links: Sequence[str]) -> dict[str, Any]:
    """The values that entries declare as DomainBed's defaults for a data set and a chain."""
    entries = _entries(space, data, links)
    return {k: entry["default"] for k, entry in entries.items() if "default" in entry}


def grid_size(space: Space, *, data: str = "", links: Sequence[str] = ()) -> int:
    """How many combinations a grid has; 1 where the space has no axis."""
    return math.prod(len(e["grid"]) for e in _entries(space, data, links).values() if "grid" in e)


def grid(space: Space, index: int, *, data: str = "", links: Sequence[str] = ()) -> dict[str, Any]:
    """Combination `index` of a grid, from 0; the last axis of the space varies fastest.

    Raises `UserError` for a space that is no grid, and an index outside it.

    >>> space = {"optimizer.lr": {"grid": [1e-5, 3e-5]}, "model.dropout": {"grid": [0.0, 0.5]}}
    >>> [list(grid(space, i).values()) for i in range(3)]
    [[1e-05, 0.0], [1e-05, 0.5], [3e-05, 0.0]]
    """
    entries = _entries(space, data, links)
    drawn = [setting for setting, entry in entries.items() if not {"grid", "fixed"} & entry.keys()]
    require(not drawn, f"search.{drawn[0] if drawn else ''} is drawn at random: not of a grid")
    axes = [entry.get("grid") or [entry["fixed"]] for entry in entries.values()]
    size = math.prod(map(len, axes))
    require(0 <= index < size, f"combination {index} of a grid that has {size}, from 0")
    values = next(itertools.islice(itertools.product(*axes), index, None))
    return dict(zip(entries, values, strict=True))


def _value(entry: Mapping[str, Any], seed: int) -> Any:
    if "fixed" in entry:
        return entry["fixed"]
    (kind,) = entry.keys() & RANDOM.keys()
    return RANDOM[kind](np.random.RandomState(seed_hash(seed, entry["name"])), entry[kind])


def _entries(space: Space, data: str, links: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The entries that count, each without `for` and `only`."""
    check(space)
    found = {}
    for setting, entry in space.items():
        needed = entry.get("only") or _link(setting)
        if not needed or set(needed) & set(links):
            found[setting] = _settled(entry, data, links)
    return found


def _link(setting: str) -> list[str]:
    part, _, rest = setting.partition(".")
    return [rest.partition(".")[0]] if part == "trainer" else []


def _settled(entry: Mapping[str, Any], data: str, links: Sequence[str]) -> dict[str, Any]:
    base = {k: v for k, v in entry.items() if k not in ("for", "only")}
    for name, other in (entry.get("for") or {}).items():
        if name in links or plain(str(name)) == plain(data):
            instead = _settled(other, data, links)
            if instead.keys() & set(KINDS):
                base = {k: v for k, v in base.items() if k not in KINDS}
            return base | instead
    return base


def check(space: Space) -> None:
    """Raise `UserError`, one line that names the setting, for what is no search space."""
    require(
        isinstance(space, Mapping), f"search={space}: write settings and what they are drawn by"
    )
    grids = drawn = ""
    for setting, entry in space.items():
        where = f"search.{setting}"
        for found in _forms(entry, where, {}):
            over = found.get("over")
            if over is not None and (over not in space or space[over].get("only")):
                raise unknown("setting that is always drawn", over, space, f"{where}.over")
            grids = grids or (setting if "grid" in found else "")
            drawn = drawn or (setting if found.keys() & RANDOM.keys() else "")
    require(
        not (grids and drawn),
        f"search.{grids} is an axis of a grid and search.{drawn} is drawn: a space is one or the "
        "other",
    )


def _forms(entry: Any, where: str, above: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Every form that an entry may take, checked: as it stands, and for each name in `for`."""
    require(isinstance(entry, Mapping), f"{where}={entry}: write a kind and its values")
    for key in entry:
        if key not in KEYS:
            raise unknown("kind or key", key, KEYS, where)
    kinds = [k for k in KINDS if k in entry]
    require(len(kinds) <= 1, f"{where} is both {' and '.join(kinds)}: write one of them")
    base = {k: v for k, v in above.items() if not kinds or k not in KINDS}
    whole = base | {k: v for k, v in entry.items() if k != "for"}
    _check_form(whole, where)
    yield whole
    inner = entry.get("for") or {}
    require(isinstance(inner, Mapping), f"{where}.for={inner}: write names of data sets or links")
    for name, other in inner.items():
        yield from _forms(other, f"{where}.for.{name}", whole)


def _check_form(entry: Mapping[str, Any], where: str) -> None:
    kinds = [k for k in KINDS if k in entry]
    require(bool(kinds), f"{where} has no kind: write one of {', '.join(KINDS)}")
    (kind,) = kinds
    value = entry[kind]
    if kind in ("choice", "grid"):
        fine = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
        require(fine, f"{where}.{kind}={value}: write a list of values")
    elif kind != "fixed":
        fine = isinstance(value, Sequence) and len(value) == 2 and all(map(_number, value))
        require(fine and value[0] <= value[1], f"{where}.{kind}={value}: write [least, most]")
    named = isinstance(entry.get("name"), str)
    require(kind not in RANDOM or named, f"{where}.name is missing: draws are made from a name")
    only = entry.get("only", [])
    listed = isinstance(only, Sequence) and not isinstance(only, str)
    require(listed, f"{where}.only={only}: write a list of links")


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
