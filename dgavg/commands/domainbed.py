"""`dgavg domainbed`: the tables of DomainBed's runs, and of dgavg's beside them."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from dgavg.benchmark.domainbed import ForeignRun, convert, read_folder, render
from dgavg.benchmark.domainbed.records import Record
from dgavg.benchmark.domainbed.tables import known
from dgavg.benchmark.reading import read_runs
from dgavg.errors import UserError


def domainbed(arguments: list[str]) -> None:
    """Print the tables of a folder of DomainBed runs as DomainBed prints them.

    With folders of dgavg runs, every candidate of those is one more algorithm.
    """

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message}; write dgavg domainbed DIR [FOLDER ...] [--latex]")

    parser = argparse.ArgumentParser("dgavg domainbed", description=domainbed.__doc__)
    parser.error = refuse  # type: ignore[method-assign]
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
        if unfinished:
            notes.append(f"left out {unfinished} run(s) that have not ended")
    unknown = {r["args"]["dataset"] for r in records} - set(known(records))
    if unknown:
        notes.append(f"DomainBed has no data set {', '.join(sorted(unknown))}: in no table")
    print(render(records, latex=options.latex, names=width))
    for note in notes:
        print(f"dgavg: {note}", file=sys.stderr)


def _beside(run: ForeignRun, theirs: tuple[Record, ...]) -> ForeignRun:
    """The run under a name that none of DomainBed's runs has, lest they count as the same."""
    name = run.train_args["algorithm"]
    if all(record["args"]["algorithm"] != name for record in theirs):
        return run
    args = {"algorithm": f"{name} (dgavg)"}
    records = tuple({**r, "args": {**r["args"], **args}} for r in run.records)
    return replace(run, train_args={**run.train_args, **args}, records=records)
