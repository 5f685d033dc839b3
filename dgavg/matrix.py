"""Which links may stand in one chain: every ordered pair, as a page."""

from __future__ import annotations

from collections.abc import Iterable

from dgavg.cards import PLANES, card
from dgavg.chain import check, find_trainer, known_trainers
from dgavg.errors import UserError
from dgavg.trainers.basic import Basic

HEAD = """# Which links go together

Written by `dgavg list pairs > zoo/pairs.md`; a row is the outer link, a column the inner one. A
blank pair trains: the tests run each of them and show that both links act, that the weights move
and stay finite, that it resumes exactly, and that the order makes no difference where the links
override different methods. The others are refused when the chain is built:
"""
WHY = {
    "first": "the inner link rewrites the live weights, so it must come first",
    "split": "one link compares domains, the other feeds it one at a time",
    "step": "each link replaces the whole step",
    "compare": "each link compares the domains' gradients, of which the inner one would see one",
}


def refusal(outer: str, inner: str) -> str:
    """Why `<outer>_<inner>_basic` is refused, a key of `WHY`; empty where it is legal."""
    links = [find_trainer(name) for name in (inner, outer)]
    head = Basic()
    for link in links:
        head = link(head)  # type: ignore[assignment]
    try:
        check(head)
    except UserError:
        if links[0].outermost:
            return "first"
        if all(link.compares_gradients for link in links):
            return "compare"
        return "step" if all(link.owns_step for link in links) else "split"
    return ""


def page() -> str:
    """The page, in Markdown: a table for each plane of the outer link."""
    names = [name for name in known_trainers() if name != "basic"]
    by_plane = {p: [n for n in names if card(n).plane == p] for p in PLANES}
    lines = [HEAD, *(f"- `{key}`: {why}." for key, why in WHY.items()), ""]
    for plane, outer in by_plane.items():
        if outer:
            lines += [f"## {plane} outside", "", *_table(outer, names), ""]
    return "\n".join(lines)


def _table(rows: Iterable[str], columns: Iterable[str]) -> list[str]:
    names = list(columns)
    lines = ["| | " + " | ".join(f"`{n}`" for n in names) + " |"]
    lines.append("| --- |" + " --- |" * len(names))
    for row in rows:
        cells = ["·" if row == n else refusal(row, n) for n in names]
        lines.append(f"| `{row}` | " + " | ".join(cells) + " |")
    return lines
