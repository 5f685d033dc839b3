"""`dgavg domainbed`: the tables of DomainBed's runs, and of dgavg's beside them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dgavg.benchmark.domainbed import ForeignRun, convert, read_folder, render
from dgavg.benchmark.domainbed.records import Record
from dgavg.benchmark.domainbed.tables import known
from dgavg.benchmark.reading import read_runs
from dgavg.commands.say import Parser, left_out, tell


def domainbed(arguments: list[str]) -> None:
    """Print the tables of a folder of DomainBed runs as DomainBed prints them.

    With folders of dgavg runs, every candidate of those is one more algorithm.
    """
    parser = Parser(
        "domainbed", domainbed.__doc__, "write dgavg domainbed DIR [FOLDER ...] [--latex]"
    )
    parser.add_argument("dir", type=Path, help="of DomainBed runs, as its sweeps write them")
    parser.add_argument("folders", nargs="*", type=Path, help="of dgavg runs, for the same tables")
    parser.add_argument("--latex", action="store_true", help="a LaTeX document")
    options = parser.parse_intermixed_args(arguments)

    theirs = read_folder(options.dir)
    records, notes, width = list(theirs.records), list(theirs.notes), 0
    if options.folders:
        runs, unfinished = read_runs(options.folders)
        found = convert(runs)
        ours = [r for run in found.runs for r in _beside(run, theirs.records).records]
        width = max(len(r["args"]["algorithm"]) for r in ours)
        records += ours
        notes += found.notes
        notes += left_out(unfinished)
    unknown = {r["args"]["dataset"] for r in records} - set(known(records))
    if unknown:
        notes.append(f"DomainBed has no data set {', '.join(sorted(unknown))}: in no table")
    print(render(records, latex=options.latex, names=width))
    tell(*notes)


def _beside(run: ForeignRun, theirs: tuple[Record, ...]) -> ForeignRun:
    """The run under a name that none of DomainBed's runs has, lest they count as the same."""
    name = run.train_args["algorithm"]
    if all(record["args"]["algorithm"] != name for record in theirs):
        return run
    args = {"algorithm": f"{name} (dgavg)"}
    records = tuple({**r, "args": {**r["args"], **args}} for r in run.records)
    return replace(run, train_args={**run.train_args, **args}, records=records)
