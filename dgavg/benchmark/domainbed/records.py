"""DomainBed's records: one line of JSON a checkpoint, a folder a run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgavg.errors import UserError, require

Record = Mapping[str, Any]
ARGS: dict[str, type] = {
    "dataset": str,
    "algorithm": str,
    "test_envs": list,
    "trial_seed": int,
    "hparams_seed": int,
}


@dataclass(frozen=True)
class Records:
    """The records of a folder in the order DomainBed reads them, and what a reader should know."""

    records: tuple[Record, ...]
    notes: tuple[str, ...] = ()


def read_folder(folder: Path) -> Records:
    """All `folder/*/results.jsonl`, of runs that have ended or not, as DomainBed reads them.

    Sub-folders come in the order of the file system, as there: algorithms that DomainBed doesn't
    know stand in its tables in the order in which they are found. A last line without its newline,
    which DomainBed can't read, is read and noted.

    Raises `UserError` for a folder that is missing or has no records, and for a damaged line, with
    its file and number.
    """
    require(folder.is_dir(), f"no folder {folder}: give one of DomainBed runs, one folder a run")
    records: list[Record] = []
    notes: list[str] = []
    for name in os.listdir(folder):
        path = folder / name / "results.jsonl"
        if path.is_file():
            records += _read(path, notes)
    require(
        bool(records),
        f"no record in {folder}/*/results.jsonl: give a folder of DomainBed runs, one folder a run",
    )
    return Records(tuple(records), tuple(notes))


def _read(path: Path, notes: list[str]) -> Iterator[Record]:
    try:
        *lines, rest = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if rest:
        lines.append(rest)
        notes.append(f"{path} ends without a newline, where DomainBed stops; its last line is read")
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        where = f"{path}, line {number}"
        if not isinstance(record, dict):
            raise UserError(
                f"{where}: damaged, not a record of DomainBed; delete the line or the folder"
            )
        check(record, where)
        yield record


def check(record: Record, where: str) -> None:
    """Raise `UserError` unless a record has all that DomainBed's tables read of it."""
    args = record.get("args")
    found = args if isinstance(args, dict) else {}
    missing = [f"args.{key}" for key, kind in ARGS.items() if not _is(found.get(key), kind)]
    if not _is(record.get("step"), (int, float)):
        missing.append("step")
    if not missing:
        envs = found["test_envs"]
        fine = envs and all(_is(e, int) and e >= 0 for e in envs) and len(set(envs)) == len(envs)
        missing = [] if fine else ["args.test_envs"]
    if not missing:
        read = ["env0_out_acc", "env1_out_acc"]  # no fewer domains than two
        read += [f"env{i}_{part}_acc" for i in found["test_envs"] for part in ("in", "out")]
        given = [k for k in record if k.startswith("env") and k.endswith("_acc")]
        missing = [
            k for k in dict.fromkeys([*read, *given]) if not _is(record.get(k), (int, float))
        ]
    require(
        not missing,
        f"{where}: {', '.join(missing)} missing or of another type; not a record of DomainBed",
    )


def _is(value: object, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
