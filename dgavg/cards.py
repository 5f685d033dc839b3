"""Cards: what a link says of itself in its docstring, as a table and one by one."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from dgavg.chain import find_trainer
from dgavg.errors import UserError

PLANES = ("basic", "loss", "batch", "gradient", "model", "schedule", "weights")


@dataclass(frozen=True)
class Card:
    """A link as its docstring describes it; parts that it does not name are empty.

    The docstring's first line is `Title (authors year, source).`; its paragraphs `Cost: ...` and
    `Avoid: ...` say what a step costs and when not to use it. `plane` is the folder of its module.
    """

    name: str
    plane: str
    title: str
    source: str
    cost: str
    avoid: str
    text: str


def card(name: str) -> Card:
    """The card of a link; of a plugin that can't be loaded, one that says why."""
    try:
        cls = find_trainer(name)
    except UserError as error:  # one bad plugin hides no other
        return Card(name, "", str(error), "", "", "", str(error))
    text = inspect.getdoc(cls) or ""
    first = text.partition("\n")[0]
    found = re.fullmatch(r"(.*) \(([^()]*\d{4}[^()]*)\)\.", first)
    title, source = found.groups() if found else (first.rstrip("."), "")
    home = cls.__module__.removeprefix("dgavg.trainers.").split(".")[0]
    plane = home if home in PLANES else ""
    return Card(name, plane, title, source, _part(text, "Cost"), _part(text, "Avoid"), text)


def _part(text: str, word: str) -> str:
    """The first sentence of the paragraph that begins with `word:`."""
    paragraphs = [
        p.removeprefix(f"{word}: ") for p in text.split("\n\n") if p.startswith(f"{word}:")
    ]
    sentences = re.split(r"[.;](?:\s|$)", " ".join(paragraphs[0].split())) if paragraphs else [""]
    return sentences[0]


def table(names: Iterable[str]) -> Table:
    """One row a link, by plane: its name, what it is, its source, what a step costs more."""
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("plane", "trainer", "what it is", "source", "cost of a step"):
        found.add_column(head, no_wrap=head in ("plane", "trainer"), overflow="fold")
    order = [*PLANES, ""]
    cards = sorted(map(card, names), key=lambda c: (order.index(c.plane), c.name))
    for c in cards:
        found.add_row(*(Text(word) for word in (c.plane, c.name, c.title, c.source, c.cost)))
    return found
