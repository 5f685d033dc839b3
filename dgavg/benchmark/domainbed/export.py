"""Writing runs in the layout of DomainBed's sweeps."""

from __future__ import annotations

import json
from pathlib import Path

from dgavg.benchmark.domainbed.convert import Conversion
from dgavg.benchmark.domainbed.records import read_folder
from dgavg.disk import write_text, writing
from dgavg.errors import require

HINT = "choose another folder to export to"


def export(conversion: Conversion, out: Path) -> None:
    """Write a folder a run below `out`: `results.jsonl`, and `done` after it.

    What an earlier export wrote of the same runs is replaced.

    Raises `UserError` where the system refuses, and where `out` holds other runs of the same
    algorithm and data set: tables would take them for more runs of it.
    """
    _check_alone(conversion, out)
    for run in conversion.runs:
        folder = out / run.folder
        lines = [json.dumps(record, sort_keys=True) + "\n" for record in run.records]
        with writing(folder, HINT):
            folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "results.jsonl", "".join(lines))
        write_text(folder / "done", "done")


def _check_alone(conversion: Conversion, out: Path) -> None:
    if not any(out.glob("*/results.jsonl")):
        return
    ours = {run.folder for run in conversion.runs}
    names = {(run.train_args["algorithm"], run.train_args["dataset"]) for run in conversion.runs}
    for record in read_folder(out).records:
        args = record["args"]
        name = Path(str(args.get("output_dir") or "")).name
        require(
            name in ours or (args["algorithm"], args["dataset"]) not in names,
            f"{out} holds other runs of {args['algorithm']} on {args['dataset']}, which would "
            "count as the same: export to a new folder (dgavg domainbed shows both in one table)",
        )
