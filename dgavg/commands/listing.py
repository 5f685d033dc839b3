"""`dgavg list`: trainers, data sets, models, protocols and recipes, or the card of one."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console

from dgavg import matrix
from dgavg.benchmark import zoo
from dgavg.benchmark.zoo import recipes
from dgavg.cards import card, table
from dgavg.chain import find_trainer, known_trainers
from dgavg.config import CONF
from dgavg.config.errors import no_recipe
from dgavg.config.schema import link_schema
from dgavg.data import DATASETS
from dgavg.errors import UserError, unknown
from dgavg.models import MODELS
from dgavg.settings import keyword_settings

WIDE = 300  # columns of a table that is read by a program
PAGES = {"pairs": matrix.page, "zoo": zoo.page}
SINGULAR = {"data": "data set"}


def show_list(arguments: list[str]) -> None:
    """Print the trainers, data sets, models or protocols there are, or the card of one of them.

    `pairs` prints the page of all pairs of trainers, `zoo` the page of all recipes.
    """
    kinds: dict[str, Callable[[], dict[str, str]]] = {
        "trainers": lambda: {k: card(k).text for k in known_trainers()},
        "data": lambda: {k: inspect.getdoc(v) or "" for k, v in sorted(DATASETS.items())},
        "models": lambda: {k: inspect.getdoc(v) or "" for k, v in sorted(MODELS.items())},
        "protocols": lambda: {
            p.stem: p.read_text().removeprefix("# @package _global_\n").removeprefix("# ")
            for p in sorted((CONF / "protocol").glob("*.yaml"))
        },
        "zoo": lambda: {recipe.name: recipe.text.removeprefix("# ") for recipe in recipes()},
    }
    if not 1 <= len(arguments) <= 2:
        raise UserError(
            "list what? Write dgavg list trainers|data|models|protocols|zoo [NAME], or pairs"
        )
    kind, *names = arguments
    if kind in PAGES and not names:
        print(PAGES[kind](), end="")
        return
    if kind == "pairs":
        raise UserError("dgavg list pairs takes no name: it prints the page of all pairs")
    if kind not in kinds:
        raise unknown("list", kind, [*kinds, "pairs"])
    entries = kinds[kind]()
    for name in names:
        if name not in entries and kind == "zoo":
            raise no_recipe(name)
        if name not in entries:
            raise unknown(SINGULAR.get(kind, kind.rstrip("s")), name, entries)
        print("\n".join([f"{name}: {entries[name].rstrip()}", *_settings(kind, name)]))
        return
    if kind == "trainers":
        width = None if sys.stdout.isatty() else WIDE
        Console(width=width, highlight=False).print(table(entries))
        return
    width = max(map(len, entries))
    for name, text in entries.items():
        print(f"{name.ljust(width)}  {text.partition(chr(10))[0]}")


def _settings(kind: str, name: str) -> list[str]:
    """The lines about the settings of one entry and their defaults."""
    if kind in ("protocols", "zoo"):
        return []  # its text is its settings
    values: Any
    if kind == "trainers":
        prefix = f"trainer.{name}"
        values = OmegaConf.to_container(OmegaConf.structured(link_schema(find_trainer(name))))
    else:
        prefix = "data" if kind == "data" else "model"
        made = DATASETS[name] if kind == "data" else MODELS[name]
        values = {k: default for k, (_, default) in keyword_settings(made).items()}
    required = ("???", inspect.Parameter.empty)
    shown = [f"  {prefix}.{k}={'...' if v in required else _yaml(v)}" for k, v in values.items()]
    return ["", *shown] if shown else []


def _yaml(value: Any) -> str:
    """A default as it is written on the command line."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_yaml, value))}]"
    return json.dumps(value) if isinstance(value, bool) or value is None else str(value)
