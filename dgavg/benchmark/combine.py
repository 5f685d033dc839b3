"""Soups and ensembles of runs that have ended: `dgavg soup`, `dgavg ensemble`."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from dgavg.averaging.ensemble import ensemble
from dgavg.averaging.learned_soup import learned_soup
from dgavg.averaging.soup import greedy_soup, uniform_soup
from dgavg.benchmark.bench import Bench, Scores, Setup
from dgavg.benchmark.checks import check_choices, find_device
from dgavg.benchmark.experiment import PLACES
from dgavg.benchmark.files import read_records, record_line, save_weights
from dgavg.benchmark.fold import threads_for
from dgavg.benchmark.folder import check_same, locked, read_config
from dgavg.benchmark.members import (
    Groups,
    Member,
    check_one_start,
    find_members,
    grouped,
    is_combined,
    merged,
)
from dgavg.benchmark.rebuild import composed_like, untrained
from dgavg.benchmark.recipe import LEARNED, Recipe
from dgavg.benchmark.results import Runs, test_score
from dgavg.benchmark.table import POOLED
from dgavg.config import explained, plain
from dgavg.data import load
from dgavg.disk import make_folder, write_text
from dgavg.errors import UserError, require, unknown
from dgavg.models import MODELS
from dgavg.trainer import Weights

SETTINGS = ("device", "precision", "threads", "eval_batch_size", "runs", "name")


def combine(
    folders: Sequence[Path],
    recipe: Recipe,
    overrides: Sequence[str] = (),
    note: Callable[[str], None] = lambda text: None,
) -> tuple[Runs, int]:
    """Make what is not there yet; the records of the runs and of what is made of them.

    Also how many runs have not ended, which are left out. `overrides` are settings of the place:
    `data.root=...`, `device=...`, `runs=...`. `note` is told of each fold and seed.

    Raises `UserError` for whatever can't work.
    """
    members, unfinished = find_members(folders, recipe.candidate)
    what = f"a {recipe.kind}" if recipe.kind == "soup" else f"an {recipe.kind}"
    groups, alone = grouped(members, what=what, pooled=recipe.across_seeds)
    first = next(iter(groups.values()))[0]
    if recipe.kind == "soup":
        check_one_start(groups)
        require(
            recipe.rule == "uniform" or first.config["protocol"]["holdout_fraction"] > 0,
            f"--rule {recipe.rule}: the runs left no validation data (protocol.holdout_fraction=0) "
            "to choose by; write --rule uniform",
        )
    kitchen = _Kitchen(recipe, groups, _settings(first, overrides))
    for (held_out, seed), (member,) in alone.items():
        note(f"hold out {held_out}, seed {seed}: left out, {member.run} is alone there")
    runs: Runs = {}
    for member in members:
        runs.setdefault(member.run, []).append(read_records(member.folder / "records.jsonl"))
    made = [kitchen.made(key, f"[{i + 1}/{len(groups)}]", note) for i, key in enumerate(groups)]
    name = kitchen.folder.name
    return {**runs, str(kitchen.folder) if name in runs else name: made}, unfinished


def _settings(member: Member, overrides: Sequence[str]) -> dict[str, Any]:
    """The settings of the place, and those of the runs where none is given.

    Raises `UserError` for a setting that the runs have decided.
    """
    own = member.config["data"]
    with explained():
        settings = plain(composed_like(own, overrides))
    given = {word.lstrip("+~").partition("=")[0] for word in overrides}
    allowed = [*SETTINGS, *(f"data.{key}" for key in PLACES if key in settings["data"])]
    for word in given:
        require(
            word in allowed,
            f"{word} is as it was in the runs; here may be set: {', '.join(allowed)}",
        )
    check_choices(settings, settings["protocol"])
    taken = {
        key: settings[key] if key in given else member.config[key]
        for key in ("precision", "eval_batch_size")
    }
    return {
        **taken,
        "data": settings["data"],
        "device": find_device(settings["device"]),
        "threads": settings["threads"],
        "name": settings["name"],
        "runs": settings["runs"] if "runs" in given else member.folder.parents[2],
    }


class _Kitchen:
    """Makes one recipe for every fold and seed."""

    def __init__(self, recipe: Recipe, groups: Groups, settings: Mapping[str, Any]) -> None:
        self.recipe, self.groups, self.place = recipe, groups, settings
        first = next(iter(groups.values()))[0].config
        self.data = first["data"]
        members = [member for group in groups.values() for member in group]
        protocol = merged(members, "protocol")
        if recipe.across_seeds:
            protocol["test_split"] = "all"  # which part of it is `in` differs from seed to seed
        self.identity = {
            "trainer": {recipe.kind: recipe.settings()},
            "data": self.data,
            "model": merged(members, "model"),
            "protocol": protocol,
            "precision": settings["precision"],
            "eval_batch_size": settings["eval_batch_size"],
            "device": settings["device"].type,
        }
        name = settings["name"] or self._name()
        require(name not in (".", "..") and os.sep not in name, f"name={name!r}: not a folder name")
        self.folder = Path(settings["runs"]) / name
        for path in self.folder.glob("*/*/config.yaml"):
            require(
                is_combined(read_config(path.parent)),
                f"{self.folder} holds a trained run: choose another name=...",
            )

    def _name(self) -> str:
        runs = sorted({m.run for group in self.groups.values() for m in group})
        text = json.dumps([self.identity, runs])
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        rule = f"{self.recipe.rule}-" if self.recipe.kind == "soup" else ""
        return f"{rule}{self.recipe.kind}-{self.data['name']}-{digest}".replace(os.sep, "_")

    @cached_property
    def setup(self) -> Setup:
        """The data and the model, loaded when something is to be made.

        Raises `UserError` for data that the runs were not trained on.
        """
        data = dict(self.place["data"])
        dataset = load(data.pop("name"), **data)
        found, wanted = dataset.fingerprint(), self.data["content"]
        require(
            found == wanted,
            f"data set {dataset.name!r} is not the one the runs were trained on (content {found}, "
            f"theirs {wanted}): set data.root=FOLDER to that",
        )
        first = next(iter(self.groups.values()))[0].config
        if first["model"]["name"] not in MODELS:
            raise unknown("model", first["model"]["name"], MODELS)
        return Setup(
            dataset=dataset,
            model=partial(untrained, first, domains=len(dataset.domains) - 1),
            protocol=self.identity["protocol"],
            device=self.place["device"],
            precision=self.place["precision"],
            eval_batch_size=self.place["eval_batch_size"],
        )

    def made(
        self, key: tuple[str, int], count: str, note: Callable[[str], None]
    ) -> list[dict[str, Any]]:
        """The records of one fold and seed, made now or read.

        Raises `UserError` where the folder holds something else, or another process is at it.
        """
        held_out, seed = key
        group = self.groups[key]
        folder = self.folder / held_out.replace(os.sep, "_") / str(seed)
        described = {f"{member.run}/{member.seed}": member.described() for member in group}
        settings = {**self.identity, "members": described, "held_out": held_out, "seed": seed}
        settings = json.loads(json.dumps(settings))
        check_same(folder, settings)
        began, done = time.perf_counter(), (folder / "done").exists()
        if not done:
            threads = torch.get_num_threads()
            try:
                bench = Bench(
                    self.setup,
                    held_out,
                    None if seed == POOLED else seed,
                    self.recipe.batchnorm,
                )
                torch.set_num_threads(self.place["threads"] or threads_for(bench.model))
                with locked(folder):
                    check_same(folder, settings)
                    write_text(folder / "config.yaml", OmegaConf.to_yaml(settings))
                    self._make(bench, group, settings, folder)
            finally:
                torch.set_num_threads(threads)
        records = read_records(folder / "records.jsonl")
        accuracy, _ = test_score(records[0], self.recipe.kind)
        used = sum(m["share"] > 0 for m in records[0]["members"])
        runs = f"{used} of {len(group)} runs" if used < len(group) else f"{used} runs"
        took = "done before" if done else f"{time.perf_counter() - began:.1f} s"
        which = "" if seed == POOLED else f", seed {seed}"
        note(
            f"{self.recipe.chain}, hold out {held_out}{which} {count}: {100 * accuracy:.1f} "
            f"({runs}, {took})"
        )
        return records

    def _make(
        self, bench: Bench, group: Sequence[Member], settings: Mapping[str, Any], folder: Path
    ) -> None:
        """Combine, score, and write: the weights, then the record, then `done`.

        Each run's own weights are scored by the same policy, to have something to compare with.
        """
        began = time.perf_counter()
        paths = [member.weights for member in group]
        if self.recipe.kind == "soup":
            try:
                weights, notes, more = self._soup(bench, paths)
            except ValueError as error:
                raise UserError(str(error)) from error
            scores, weights = bench.score(weights)
            own = [bench.score(bench.load(path))[0] for path in paths]
            text = {"chain": self.recipe.chain, "candidate": "soup"}
            make_folder(folder / "weights")
            save_weights(folder / "weights" / "soup.safetensors", weights, text)
        else:
            scores, own = _ensemble(bench, paths)
            notes, more = [{"share": 1 / len(paths)}] * len(paths), {}
        members = [
            {"run": m.run, "seed": m.seed, **m.described(), **extra, "splits": alone}
            for m, extra, alone in zip(group, notes, own, strict=True)
        ]
        policy = self.recipe.batchnorm if self.recipe.kind == "soup" else "average"
        record = {
            "step": max(member.step for member in group),
            "chain": self.recipe.chain,
            **settings,
            "members": members,
            **more,
            "candidates": {self.recipe.kind: {"batchnorm": policy, "splits": scores}},
            "timing": {"seconds": time.perf_counter() - began},
        }
        write_text(folder / "records.jsonl", record_line(record))
        write_text(folder / "done", "done")

    def _soup(
        self, bench: Bench, paths: Sequence[Path]
    ) -> tuple[Weights, list[dict[str, Any]], dict[str, Any]]:
        """The soup, what its record says of each run, and what of itself."""
        loaders = [partial(bench.load, path) for path in paths]
        n = len(paths)
        if self.recipe.rule == "uniform":
            return uniform_soup(loaders), [{"share": 1 / n}] * n, {}
        if self.recipe.rule == "learned":
            model, loss, batches = bench.learning(int(LEARNED["steps"]))
            learned = learned_soup(
                loaders, model, loss, batches, lr=LEARNED["lr"], temperature=True
            )
            bench.model.train()
            assert isinstance(learned.coefficients, torch.Tensor)
            shares = [{"share": c} for c in learned.coefficients.tolist()]
            return learned.weights, shares, {"temperature": learned.temperature}
        greedy = greedy_soup(loaders, bench.validation, ties=self.recipe.rule == "restricted")
        kept = {i: 1 / len(greedy.members) for i in greedy.members}
        notes = [
            {"share": kept.get(i, 0.0), "validation": greedy.scores[i], "tried": greedy.tried[i]}
            for i in range(n)
        ]
        return greedy.weights, notes, {}


def _ensemble(bench: Bench, paths: Sequence[Path]) -> tuple[Scores, list[Scores]]:
    """Scores of summed logits, and those of each run alone.

    The loss is that of the mean of the logits, whose scale is a single model's.
    """
    own = []

    def logits(weights: Weights) -> torch.Tensor:
        found = bench.logits(weights)
        own.append(bench.score_logits(found))
        return found

    total = ensemble([partial(bench.load, path) for path in paths], logits)
    return bench.score_logits(total / len(paths)), own
