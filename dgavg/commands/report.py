"""`dgavg report`: the tables of runs that have ended, as text, as a page and as figures."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from dgavg.benchmark.picture import save_svg
from dgavg.benchmark.reading import Environments, read_runs_and_environments
from dgavg.benchmark.results import Runs
from dgavg.benchmark.table import separated, tables
from dgavg.commands.say import Parser, left_out, tell
from dgavg.errors import UserError
from dgavg.evaluation import RULES

USE = "write dgavg report [FOLDER ...] [--rule RULE] [--html FILE] [--figures DIR] [--svg FILE]"
PAGE = "report.html"


def report(arguments: list[str]) -> None:
    """Print the tables of finished runs, and write a page of all that they say."""
    parser = Parser("report", report.__doc__, USE)
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("runs")])
    parser.add_argument("--rule", help=f"selection rule: {', '.join(RULES)}")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--html", type=Path, help=f"the page; {PAGE} in the first folder if not given"
    )
    where.add_argument("--no-html", action="store_true", help="write no page")
    parser.add_argument("--figures", type=Path, help="write the page's figures here as PNG, too")
    parser.add_argument("--svg", type=Path, help="draw the tables into this file, too")
    options = parser.parse_intermixed_args(arguments)
    runs, unfinished, environments = read_runs_and_environments(options.folders)
    found = tables(runs, options.rule)
    parts = [
        text
        for table in found
        for text in (str(table), table.differences(), table.correlations())
        if text
    ]
    print("\n\n".join(parts), flush=True)
    if options.svg is not None:
        save_svg(found, options.svg)
    tell(*left_out(unfinished))
    _draw(options, runs, environments)


def _draw(options: Namespace, runs: Runs, environments: Environments) -> None:
    """Write the page and the figures; the page that nobody asked for is no reason to fail."""
    asked = options.html is not None or options.figures is not None
    if options.no_html and not asked:
        return
    try:
        try:
            from dgavg.report import Section, write_figures, write_page
        except ModuleNotFoundError as error:
            missing = str(error.name).partition(".")[0]
            raise UserError(f"the page needs {missing}: pip install 'dgavg[report]'") from error
        sections = [Section(each, options.rule, environments) for each in separated(runs)]
        if not options.no_html:
            path = options.html or options.folders[0] / PAGE
            write_page(sections, path)
            tell(f"wrote {path}")
    except UserError as error:
        if asked:
            raise
        tell(f"no page: {error}")
        return
    if options.figures is not None:
        files = write_figures(sections, options.figures)
        tell(f"wrote {len(files)} figures to {options.figures}")
