"""The runs that a soup or an ensemble is made of: found, grouped by fold and seed, checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgavg.benchmark.files import differences, read_records
from dgavg.benchmark.fold import read_config
from dgavg.benchmark.table import POOLED, finished_runs
from dgavg.errors import require, unknown
from dgavg.evaluation import selected_step

Groups = dict[tuple[str, int], list["Member"]]  # by held-out domain and seed


@dataclass(frozen=True, eq=False)
class Member:
    """A run that has ended, and the weights of one of its candidates."""

    folder: Path
    run: str
    config: Mapping[str, Any]
    step: int
    candidate: str

    @property
    def held_out(self) -> str:
        """The domain that was left out."""
        return str(self.config["held_out"])

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return int(self.config["seed"])

    @property
    def init_seed(self) -> int:
        """What its initial weights were drawn from."""
        return int(self.config.get("init_seed", self.seed))

    @property
    def weights(self) -> Path:
        """The file of its weights."""
        return _weights_file(self.folder, self.candidate)

    def described(self) -> dict[str, Any]:
        """What settings and records say of it: equal for runs of equal weights."""
        digest = hashlib.sha256(json.dumps(self.config).encode()).hexdigest()[:8]
        return {"candidate": self.candidate, "step": self.step, "settings": digest}


def _weights_file(folder: Path, candidate: str) -> Path:
    return folder / "weights" / f"{candidate}.safetensors"


def is_combined(config: Mapping[str, Any]) -> bool:
    """Whether a run is a soup or an ensemble of others."""
    return "members" in config


def find_members(folders: Sequence[Path], candidate: str) -> tuple[list[Member], int]:
    """The runs below `folders` with their weights, and how many have not ended.

    Soups and ensembles are no members. Raises `UserError` for a folder that is missing or without a
    finished run, for a run without such weights, and for damaged files.
    """
    found, unfinished = finished_runs(folders)
    configs = {folder: read_config(folder) for folder in found}
    trained = {folder: c for folder, c in configs.items() if not is_combined(c)}
    require(
        bool(trained),
        f"no finished run but soups and ensembles in {', '.join(map(str, folders))}",
    )
    return [_member(folder, found[folder], c, candidate) for folder, c in trained.items()], (
        unfinished
    )


def _member(folder: Path, run: str, config: Mapping[str, Any], candidate: str) -> Member:
    if not _weights_file(folder, candidate).exists():
        there = sorted(path.stem for path in (folder / "weights").glob("*.safetensors"))
        raise unknown("weights of candidate", candidate, there, str(folder))
    records = read_records(folder / "records.jsonl")
    index = selected_step(records, candidate, config["protocol"]["selection"])
    step = records[-1 if index is None else index]["step"]
    return Member(folder, run, config, step, candidate)


def grouped(members: Sequence[Member], *, what: str, pooled: bool) -> tuple[Groups, Groups]:
    """The members of each fold and seed, or of each fold alone where seeds are `pooled`.

    Groups of two or more, in an order of their own whatever that of the folders, then those of one.
    Raises `UserError` where all are of one, and for runs that differ in data, model or protocol.
    """
    _check_alike(members, what)
    groups: Groups = {}
    for member in sorted(members, key=lambda m: (m.run, m.seed)):
        key = (member.held_out, POOLED if pooled else member.seed)
        groups.setdefault(key, []).append(member)
    several = {key: groups[key] for key in sorted(groups) if len(groups[key]) > 1}
    alone = {key: group for key, group in groups.items() if len(group) == 1}
    names = ", ".join(dict.fromkeys(member.run for member in members))
    hint = " (or --across-seeds)" if not pooled and len(members) > 1 else ""
    require(
        bool(several),
        f"{what} needs at least two runs of one held-out domain and seed{hint}; here is only "
        f"{names}",
    )
    return several, alone


def check_one_start(groups: Groups) -> None:
    """Raise `UserError` where the runs of a group began with different weights."""
    for group in groups.values():
        first = group[0]
        for member in group:
            require(
                member.init_seed == first.init_seed,
                f"{_place(member)} and {_place(first)} began with different weights, so their "
                "average is no model: train them with one init_seed=0, or use dgavg ensemble",
            )


def _place(member: Member) -> str:
    init_seed = member.config.get("init_seed", "null")
    return f"{member.run} (seed {member.seed}, init_seed {init_seed})"


def _check_alike(members: Sequence[Member], what: str) -> None:
    first = members[0]
    for member in members:
        for part in ("data", "model", "protocol"):
            mine, theirs = (_compared(m.config, part) for m in (member, first))
            found = "; ".join(differences(mine, theirs, part))
            require(
                not found,
                f"{member.run} and {first.run} differ in {part} ({found}): {what} is of runs that "
                "share it; name the folders of those",
            )


def _compared(config: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    """Data count by what is in them, wherever they came from."""
    found: Mapping[str, Any] = config[part]
    return {k: found[k] for k in ("name", "content")} if part == "data" else found
