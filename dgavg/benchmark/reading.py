"""Finding the runs below folders, and reading their records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dgavg.benchmark.environment import read_environments
from dgavg.benchmark.files import read_records
from dgavg.benchmark.results import Runs
from dgavg.errors import require

Key = tuple[str, str | None, int]  # of a run in its group: held-out domains and seed
Environments = dict[tuple[str, Key], list[dict[str, Any]]]  # by name and key of a run


def finished_runs(folders: Sequence[Path]) -> tuple[dict[Path, str], int]:
    """The folder of every finished run below `folders` with its name, and how many have not ended.

    Raises `UserError` for a folder that is missing or holds no finished run.
    """
    found: list[Path] = []
    seen: set[Path] = set()
    unfinished = 0
    for folder in folders:
        require(folder.is_dir(), f"no folder {folder}: give one of runs, such as runs/")
        each = {path.resolve().parent for path in folder.rglob("config.yaml")}
        ended = {run for run in each if (run / "done").exists()}
        require(bool(ended), f"no finished run in {folder}")
        unfinished += len(each - ended - seen)
        found += sorted(ended - seen)
        seen |= each
    return named(found), unfinished


def named(runs: Iterable[Path]) -> dict[Path, str]:
    """The folders of runs, each once, with the name of each; groups of one name by their path."""
    found = list(dict.fromkeys(runs))
    names = [path.name for path in dict.fromkeys(run.parent.parent for run in found)]
    return {
        run: group.name if names.count(group.name) == 1 else str(group)
        for run in found
        for group in [run.parent.parent]
    }


def read_runs(folders: Sequence[Path]) -> tuple[Runs, int]:
    """The records of every finished run below `folders`, and how many have not ended.

    Raises `UserError` as `finished_runs` does, and for damaged records.
    """
    runs, unfinished, _ = read_runs_and_environments(folders)
    return runs, unfinished


def read_runs_and_environments(folders: Sequence[Path]) -> tuple[Runs, int, Environments]:
    """As `read_runs`, and where each run was trained."""
    found, unfinished = finished_runs(folders)
    runs: Runs = {}
    environments: Environments = {}
    for folder, name in found.items():
        records = read_records(folder / "records.jsonl")
        runs.setdefault(name, []).append(records)
        environments[name, key_of(records[0])] = read_environments(folder)
    return runs, unfinished, environments


def key_of(record: Mapping[str, Any]) -> Key:
    """What tells a run from the others of its name."""
    return record["held_out"], record.get("held_out_with"), record["seed"]


def records_of(runs: Mapping[Path, str]) -> Runs:
    """The records of runs, by the name of each.

    Raises `UserError` for damaged ones.
    """
    found: Runs = {}
    for folder, name in runs.items():
        found.setdefault(name, []).append(read_records(folder / "records.jsonl"))
    return found
