"""`dgavg export --domainbed OUT`: finished runs in the layout of DomainBed's sweeps."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from dgavg.benchmark.domainbed import convert, export
from dgavg.benchmark.reading import read_runs
from dgavg.commands.say import left_out, tell


def export_domainbed(
    folders: Sequence[Path], out: Path, candidates: Collection[str] | None = None
) -> None:
    """Write every finished run below `folders` into `out`, each candidate as an algorithm.

    Raises `UserError` as `convert` and `export` do; then nothing is written but for a full disk.
    """
    runs, unfinished = read_runs(folders)
    found = convert(runs, candidates)
    export(found, out)
    algorithms = sorted({run.train_args["algorithm"] for run in found.runs})
    print(f"{len(found.runs)} runs of {', '.join(algorithms)} in {out}")
    tell(*found.notes, *left_out(unfinished))
