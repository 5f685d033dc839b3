"""The runs that a soup or an ensemble is made of: found, grouped by fold and seed, checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dgavg.benchmark.files import differences, read_records
from dgavg.benchmark.folder import read_config
from dgavg.benchmark.reading import finished_runs
from dgavg.benchmark.table import POOLED
from dgavg.chain import adapting
from dgavg.errors import require, unknown
from dgavg.evaluation import selected_step
from dgavg.trainer import Trainer, may_be_scheduled

Groups = dict[tuple[str, int], list["Member"]]  # by held-out domain and seed
# Members agree in the data, wherever they came from, in their splits and scores, and in the model;
# what else a sweep varies, they may differ in.
DATA = ("name", "content", "splits")
PROTOCOL = ("name", "holdout_fraction", "test_split", "selection")
REGULARISATION = ("dropout",)  # of the settings of a model, those that are no part of what it is


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
        return weights_file(self.folder, self.candidate)

    def described(self) -> dict[str, Any]:
        """What settings and records say of it: equal for runs of equal weights."""
        digest = hashlib.sha256(json.dumps(self.config).encode()).hexdigest()[:8]
        return {"candidate": self.candidate, "step": self.step, "settings": digest}


def weights_file(folder: Path, candidate: str) -> Path:
    """Where a run keeps the weights of a candidate."""
    return folder / "weights" / f"{candidate}.safetensors"


def is_combined(config: Mapping[str, Any]) -> bool:
    """Whether a run is a soup or an ensemble of others."""
    return "members" in config


def is_of_two(config: Mapping[str, Any]) -> bool:
    """Whether a run left two domains out: it is there to choose by, not to be combined."""
    return "held_out_with" in config


def find_members(folders: Sequence[Path], candidate: str) -> tuple[list[Member], int]:
    """The runs below `folders` with their weights, and how many have not ended.

    Soups, ensembles and runs that left two domains out are no members. Raises `UserError` for a
    folder that is missing or without a finished run, for a run without such weights, and for
    damaged files.
    """
    found, unfinished = finished_runs(folders)
    configs = {folder: read_config(folder) for folder in found}
    trained = {
        folder: c for folder, c in configs.items() if not is_combined(c) and not is_of_two(c)
    }
    require(
        bool(trained),
        f"no finished run but soups and ensembles in {', '.join(map(str, folders))}",
    )
    return [_member(folder, found[folder], c, candidate) for folder, c in trained.items()], (
        unfinished
    )


def _member(folder: Path, run: str, config: Mapping[str, Any], candidate: str) -> Member:
    if not weights_file(folder, candidate).exists():
        there = sorted(path.stem for path in (folder / "weights").glob("*.safetensors"))
        raise unknown("weights of candidate", candidate, there, str(folder))
    records = read_records(folder / "records.jsonl")
    index = selected_step(records, candidate, config["protocol"]["selection"])
    step = records[-1 if index is None else index]["step"]
    return Member(folder, run, config, step, candidate)


def grouped(members: Sequence[Member], *, what: str, pooled: bool) -> tuple[Groups, Groups]:
    """The members of each fold and seed, or of each fold alone where seeds are `pooled`.

    Groups of two or more, in an order of their own whatever that of the folders, then those of one.
    Raises `UserError` where all are of one, and for runs that differ in data, splits, scoring or
    model.
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


def merged(members: Sequence[Member], part: str) -> dict[str, Any]:
    """One part of the settings of several runs; where they differ, text of all values: "8, 16"."""
    each: list[Mapping[str, Any]] = [member.config[part] for member in members]
    found = {}
    for key in dict.fromkeys(key for settings in each for key in settings):
        values: list[Any] = []
        for value in (settings.get(key) for settings in each):
            values += [] if value in values else [value]
        found[key] = values[0] if len(values) == 1 else _listed(values)
    return found


def _listed(values: Sequence[Any]) -> str:
    """In an order of their own: numbers by size, then the rest."""
    numbers = sorted(v for v in values if isinstance(v, int | float))
    others = sorted(str(v) for v in values if not isinstance(v, int | float))
    return ", ".join([*map(str, numbers), *others])


def _check_alike(members: Sequence[Member], what: str) -> None:
    first = members[0]
    wanted = _agreed(first.config)
    for member in members:
        for part, mine in _agreed(member.config).items():
            found = "; ".join(differences(mine, wanted[part], part))
            name = "links that change the model" if part == "trainer" else part
            require(
                not found,
                f"{member.run} and {first.run} differ in {name} ({found}): {what} is of runs that "
                "share it; name the folders of those",
            )


def _agreed(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What must be equal in all members, by part of the settings."""
    data, model, protocol, links = (config[k] for k in ("data", "model", "protocol", "trainer"))
    return {
        "data": {k: data[k] for k in DATA if k in data},
        "model": {k: v for k, v in model.items() if k not in REGULARISATION},
        "trainer": {k.name: _structure(k, links[k.name]) for k in adapting(links)},
        "protocol": {k: protocol[k] for k in PROTOCOL},
    }


def _structure(link: Trainer, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that may change the model: numbers that may follow a schedule can't."""
    free = {f.name for f in fields(link) if may_be_scheduled(type(link), f.name)}
    return {k: v for k, v in settings.items() if k not in free}
