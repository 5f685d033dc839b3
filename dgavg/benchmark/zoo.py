"""The recipes of `zoo/`: what each is, what was published of it, and what was measured here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from dgavg.config.zoo_source import ABOUT, ZOO

HEAD = """# Recipes

`dgavg +zoo=NAME` runs one, `dgavg list zoo NAME` prints it with its measured tables. Each overrides
only what it changes, and further settings may follow: `dgavg +zoo=pacs/swad data.root=PACS`.
Published numbers are means over the held-out domains, in percent, as their source prints them.
A number stands under *measured* only if a run of dgavg gave it; nobody has measured the others yet.
This page is what `dgavg list zoo` prints.
"""
COLUMNS = ["| recipe | | published | measured |", "| --- | --- | --- | --- |"]


@dataclass(frozen=True)
class Recipe:
    """One file: its name (`pacs/swad`), first comment, text, and what it says about itself."""

    name: str
    title: str
    text: str
    about: dict[str, Any]

    @property
    def short(self) -> str:
        """What was measured, in a few words."""
        measured = self.about.get("measured")
        return str(measured["short"]) if measured else ""


def recipes(folder: Path = ZOO) -> list[Recipe]:
    """Every recipe, by name."""
    return [_read(path, folder) for path in sorted(folder.glob("*/*.yaml"))]


def _read(path: Path, folder: Path) -> Recipe:
    text = path.read_text(encoding="utf-8")
    name = str(path.relative_to(folder).with_suffix(""))
    title = text.partition("\n")[0].removeprefix("# ")
    return Recipe(name, title, text, yaml.safe_load(text).get(ABOUT) or {})


def page(every: Iterable[Recipe] | None = None) -> str:
    """The table of all recipes, as Markdown."""
    found = list(recipes() if every is None else every)
    lines = [HEAD]
    for benchmark in dict.fromkeys(recipe.name.partition("/")[0] for recipe in found):
        lines += [
            f"## {benchmark}",
            "",
            "| recipe | | published | measured |",
            "| --- | --- | --- | --- |",
        ]
        for recipe in found:
            if recipe.name.partition("/")[0] == benchmark:
                about = recipe.about
                source = " · ".join(filter(None, (recipe.title, about.get("paper"))))
                published = about.get("published") or ""
                lines.append(f"| `{recipe.name}` | {source} | {published} | {recipe.short} |")
        lines.append("")
    return "\n".join(lines)
