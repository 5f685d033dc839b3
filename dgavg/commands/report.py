"""`dgavg report`: the tables of runs that have ended."""

from __future__ import annotations

from pathlib import Path

from dgavg.benchmark.picture import save_svg
from dgavg.benchmark.reading import read_runs
from dgavg.benchmark.table import tables
from dgavg.commands.say import Parser, left_out, tell
from dgavg.evaluation import RULES


def report(arguments: list[str]) -> None:
    """Print the tables of finished runs, what chains differ by, and how validation ranks."""
    parser = Parser(
        "report", report.__doc__, "write dgavg report [FOLDER ...] [--rule RULE] [--svg FILE]"
    )
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("runs")])
    parser.add_argument("--rule", help=f"selection rule: {', '.join(RULES)}")
    parser.add_argument("--svg", type=Path, help="draw the tables into this file, too")
    options = parser.parse_intermixed_args(arguments)
    runs, unfinished = read_runs(options.folders)
    found = tables(runs, options.rule)
    parts = [
        text
        for table in found
        for text in (str(table), table.differences(), table.correlations())
        if text
    ]
    print("\n\n".join(parts))
    if options.svg is not None:
        save_svg(found, options.svg)
    tell(*left_out(unfinished))
