"""`dgavg soup` and `dgavg ensemble`: one model, or one prediction, of many runs."""

from __future__ import annotations

from pathlib import Path

from dgavg.benchmark.combine import combine
from dgavg.benchmark.recipe import RULES as SOUP_RULES
from dgavg.benchmark.recipe import Recipe
from dgavg.benchmark.table import tables
from dgavg.commands.say import Parser, left_out, say, tell


def soup(arguments: list[str]) -> None:
    """Average the weights that finished runs left, and print them all in one table."""
    parser = Parser("soup", soup.__doc__, "see dgavg soup --help")
    rules = "; ".join(f"{name}: {text}" for name, text in SOUP_RULES.items())
    parser.add_argument("--rule", default="uniform", help=f"{rules} (default: uniform)")
    parser.add_argument(
        "--candidate", default="live", help="which weights of each run (default: live)"
    )
    parser.add_argument(
        "--batchnorm",
        default="recalibrate",
        help="recalibrate: exact moments over the training images; average: those of the runs",
    )
    _combine(parser, "soup", arguments)


def ensemble(arguments: list[str]) -> None:
    """Add up the logits of the weights that finished runs left, and print them all in one table."""
    parser = Parser("ensemble", ensemble.__doc__, "see dgavg ensemble --help")
    parser.add_argument(
        "--candidate", default="sma", help="which weights of each run (default: sma)"
    )
    _combine(parser, "ensemble", arguments)


def _combine(parser: Parser, kind: str, arguments: list[str]) -> None:
    parser.add_argument(
        "words",
        nargs="*",
        default=[],
        metavar="FOLDER | SETTING=VALUE",
        help="folders of runs (default: runs); data.root=..., device=..., runs=... for the result",
    )
    parser.add_argument(
        "--across-seeds", action="store_true", help="one of all seeds, on the whole domain held out"
    )
    parser.add_argument("--name", help="the folder of the result (default: made of its settings)")
    options = vars(parser.parse_intermixed_args(arguments))
    words, name = options.pop("words"), options.pop("name")
    folders = [Path(word) for word in words if "=" not in word or Path(word).exists()]
    overrides = [word for word in words if Path(word) not in folders]
    if name is not None:
        overrides.append(f"name={name}")
    runs, unfinished = combine(
        folders or [Path("runs")], Recipe(kind, **options), overrides, note=say
    )
    print("\n\n".join(str(table) for table in tables(runs)))
    tell(*left_out(unfinished))
