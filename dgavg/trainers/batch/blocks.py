"""Blocks of a model by name, as `model.named_modules()` has them."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from torch import nn

from dgavg.errors import UserError


def find_block(model: nn.Module, name: str, setting: str) -> nn.Module:
    """The block of `model` called `name`.

    Raises `UserError` for one that isn't there, with those of a similar name.
    """
    blocks: dict[str, nn.Module] = {k: m for k, m in model.named_modules() if k}
    if name not in blocks:
        near = _similar(name, list(blocks))
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"Known: {_top(model)}"
        raise UserError(f"{setting}: the model has no block {name!r}; {hint}")
    return blocks[name]


def default_blocks(model: nn.Module, last_names: Sequence[str]) -> list[str]:
    """The blocks whose name ends in one of `last_names`, if there is one of each; else none."""
    named = [k for k, _ in model.named_modules() if k.rpartition(".")[2] in last_names]
    found = sorted(named, key=lambda k: last_names.index(k.rpartition(".")[2]))
    return found if [k.rpartition(".")[2] for k in found] == list(last_names) else []


def _similar(name: str, known: list[str]) -> list[str]:
    """Up to three names that end like `name`, or look like it."""
    ends = [k for k in known if k.endswith(f".{name}")]
    last = {k.rpartition(".")[2] for k in known}
    close = get_close_matches(name.rpartition(".")[2], last, n=1, cutoff=0.6)
    alike = [k for k in known if k.rpartition(".")[2] in close]
    near = get_close_matches(name, alike, n=3, cutoff=0.0)
    return (ends or get_close_matches(name, known, n=1, cutoff=0.8) or near)[:3]


def _top(model: nn.Module) -> str:
    """The blocks of the first two levels."""
    return ", ".join(k for k, _ in model.named_modules() if k and k.count(".") < 2)
