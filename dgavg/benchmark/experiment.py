"""Experiment: everything that a set of leave-one-domain-out runs shares."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dgavg.benchmark import search
from dgavg.benchmark.checks import (
    check_choices,
    check_functions,
    check_last,
    check_scored,
    check_stack,
    check_without_validation,
    deciding,
    find_compile,
    find_device,
)
from dgavg.chain import chain, check, settings_of, spec_of
from dgavg.config.protocols import changed
from dgavg.data import DomainDataset, load
from dgavg.distributed import first_alone, ranks
from dgavg.errors import require
from dgavg.evaluation import Stopping
from dgavg.models import Model, build_model
from dgavg.optimizers import lr_schedule, optimizer_factory
from dgavg.run import OptimizerFactory
from dgavg.settings import check_type, fits
from dgavg.trainer import Trainer

# Where data are and how they are read; what they are is in their fingerprint.
PLACES = ("root", "download", "workers", "cache", "file", "lists", "duplicates", "check")
Fold = tuple[str, ...]
ModelBuilder = Callable[[tuple[int, int, int], int], Model]


@dataclass(frozen=True)
class Experiment:
    """The folds and seeds to run, and all that their runs are built from.

    A fold is the domains it leaves out: one, or two for leave-one-domain-out cross-validation.
    `identity` is every setting that a number depends on, as JSON would hold it; two runs with the
    same identity, fold and seed give the same records.
    """

    trainer: Trainer
    dataset: DomainDataset
    model: ModelBuilder
    optimizer: OptimizerFactory
    schedule: Callable[[int], float]
    protocol: Mapping[str, Any]
    stopping: Stopping
    folds: tuple[Fold, ...]
    seeds: tuple[int, ...]
    init_seed: int | None
    device: torch.device
    precision: str
    scoring: str
    compile: str | None
    clip: float | None
    evaluate: str
    candidates: Set[str] | None
    deciding: Set[str]
    eval_batch_size: int
    also_batchnorm: tuple[str, ...]
    threads: int | None
    stack: int
    tensorboard: bool
    identity: Mapping[str, Any]
    folder: Path

    @property
    def spec(self) -> str:
        """The chain by name."""
        return spec_of(self.trainer)

    def run_folder(self, fold: Fold, seed: int) -> Path:
        """Where the run of one fold and seed lives."""
        return self.folder / "+".join(fold).replace(os.sep, "_") / str(seed)


def run_label(fold: Fold, seed: int) -> str:
    """A run of an experiment as messages name it."""
    return f"hold out {' and '.join(fold)}, seed {seed}"


def experiments(
    settings: Mapping[str, Any],
    *,
    trainer: Trainer | None = None,
    dataset: DomainDataset | None = None,
    model: ModelBuilder | None = None,
) -> list[Experiment]:
    """The experiment of composed settings; of `hparams_seed` above 0, one for each seed.

    Then settings are drawn by the protocol's search space, other ones for each seed, as DomainBed
    draws them. Raises `UserError` as `build` does, and where there is no search space.
    """
    base = build(settings, trainer=trainer, dataset=dataset, model=model)
    draw = settings["hparams_seed"]
    if draw == 0:
        return [base]
    require(draw > 0, f"hparams_seed={draw}: 0 for the settings as they are, or a draw from 1 on")
    require(
        trainer is None and model is None,
        f"hparams_seed={draw} draws settings of chain and model: give both by name",
    )
    require(
        "search" in base.identity,
        f"hparams_seed={draw}: protocol {base.protocol['name']!r} has no search space; write "
        "hparams_seed=0, or search=NAME, such as search=domainbed2020",
    )
    return [_drawn(base, settings, draw, seed) for seed in base.seeds]


def _drawn(base: Experiment, settings: Mapping[str, Any], draw: int, seed: int) -> Experiment:
    """The experiment of one seed with the settings of one draw, in the group of its base."""
    space, where = settings["search"], _where(base.trainer, base.identity["data"]["name"])
    if any("grid" in entry for entry in space.values()):
        values = search.grid(space, draw - 1, **where)
    else:
        values = search.draw(space, draw, seed, steps=base.protocol["steps"], **where)
    others = _with({**settings, "seeds": [seed]}, values)
    known = replace(base.dataset, content=base.identity["data"]["content"])  # hashed once
    one = build(others, dataset=known)
    parts = ("trainer", "model", "optimizer", "protocol")
    identity = {**base.identity, **{part: one.identity[part] for part in parts}}
    identity["search"] = {**base.identity["search"], "hparams_seed": draw}
    folder = base.folder.with_name(f"{base.folder.name}-h{draw}")
    return replace(one, identity=identity, folder=folder)


def build(
    settings: Mapping[str, Any],
    *,
    trainer: Trainer | None = None,
    dataset: DomainDataset | None = None,
    model: ModelBuilder | None = None,
) -> Experiment:
    """Build an experiment from composed settings; objects given stand in for their settings.

    Raises `UserError` for anything in them that can't work, before a file is written.
    """
    if trainer is None:
        links = settings["trainer"]
        trainer = chain("_".join(links), **{k: v or {} for k, v in links.items()})
    check(trainer)
    check_functions(trainer)
    protocol, stopping = dict(settings["protocol"]), Stopping(**settings["stopping"])
    check_choices(settings, protocol)
    decisive = deciding(trainer, stopping)
    check_scored(trainer, settings["candidates"])
    if settings["evaluate"] == "picked" and protocol["selection"] == "last":
        check_last(trainer, stopping)
    if settings["stack"] > 1:
        check_stack(trainer, settings)
    if protocol["holdout_fraction"] == 0:
        check_without_validation(trainer, stopping, protocol["selection"])
    device = find_device(settings["device"])
    compile_mode = find_compile(settings["compile"], device)
    optimizer = dict(settings["optimizer"])
    schedule, clip = _schedule(optimizer, protocol["steps"])
    check(trainer, steps=protocol["steps"])
    make_optimizer = optimizer_factory(**optimizer)

    data = dict(settings["data"]) if dataset is None else {"name": dataset.name}
    if dataset is None:
        options = {k: v for k, v in data.items() if k != "name"}
        dataset = first_alone(lambda: load(data["name"], **options))
    folds = _folds(settings["holdout"], dataset)
    most = max(map(len, folds))
    require(
        len(dataset.domains) > most,
        f"holdout={settings['holdout']} leaves no domain of the {len(dataset.domains)} to train on",
    )
    check(trainer, domains=len(dataset.domains) - most)
    build_one = model or (
        lambda shape, classes: build_model(input_shape=shape, classes=classes, **settings["model"])
    )
    identity = {
        "trainer": settings_of(trainer),
        "data": _described_data(data, dataset, protocol["splits"]),
        "model": settings["model"] if model is None else _described(build_one, dataset),
        **{k: settings[k] for k in ("optimizer", "protocol", "stopping", "precision", "evaluate")},
        "eval_batch_size": settings["eval_batch_size"],  # batch norm is recalibrated by the batch
        "device": device.type,
    }
    for key in ("init_seed", "also_batchnorm", "scoring"):
        if settings[key] not in (None, []):  # runs without them keep their names
            identity[key] = settings[key]
    if settings["candidates"] is not None:
        identity["scored"] = sorted(set(settings["candidates"]))
    if compile_mode is not None:
        identity["compile"] = compile_mode
    if settings["stack"] > 1:  # sums are rounded otherwise
        identity["stack"] = settings["stack"]
    identity = json.loads(json.dumps(identity, default=list))
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:8]
    name = settings["name"] or f"{spec_of(trainer)}-{dataset.name}-{digest}".replace(os.sep, "_")
    require(name not in (".", "..") and os.sep not in name, f"name={name!r}: not a folder name")
    names = search.names(settings["search"], **_where(trainer, data["name"]))
    if names:
        identity["search"] = {"group": digest, "hparams_seed": 0, "settings": list(names)}
    if ranks() > 1:  # crops and dropout follow from it; the run's name does not
        identity["processes"] = ranks()
    departures = changed(settings)
    if departures:
        identity["changed"] = departures
    return Experiment(
        trainer=trainer,
        dataset=dataset,
        model=build_one,
        optimizer=make_optimizer,
        schedule=schedule,
        protocol=protocol,
        stopping=stopping,
        folds=folds,
        seeds=_seeds(settings["seeds"]),
        init_seed=settings["init_seed"],
        device=device,
        precision=settings["precision"],
        scoring=settings["scoring"] or settings["precision"],
        compile=compile_mode,
        clip=clip,
        evaluate=settings["evaluate"],
        candidates=decisive.union(settings["candidates"]) if settings["candidates"] else None,
        deciding=decisive,
        eval_batch_size=settings["eval_batch_size"],
        also_batchnorm=tuple(settings["also_batchnorm"]),
        threads=settings["threads"],
        stack=settings["stack"],
        tensorboard=settings["logger"] == "tensorboard",
        identity=identity,
        folder=Path(settings["runs"]) / name,
    )


def _schedule(optimizer: dict[str, Any], steps: int) -> tuple[Callable[[int], float], float | None]:
    """The learning-rate schedule and the clipping, taken out of the optimizer's settings."""
    shape, warmup = optimizer.pop("schedule", "constant"), optimizer.pop("warmup", 0)
    check_type(shape, str, "optimizer.schedule")
    check_type(warmup, int, "optimizer.warmup")
    clip = optimizer.pop("clip", None)
    check_type(clip, float | None, "optimizer.clip")
    require(clip is None or clip > 0, f"optimizer.clip={clip}: a number above 0, or null")
    return lr_schedule(shape, warmup, steps), clip


def _where(trainer: Trainer, data: str) -> dict[str, Any]:
    """What decides which part of a search space counts."""
    return {"data": data, "links": tuple(link.name for link in trainer)}


def _with(settings: Mapping[str, Any], drawn: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with others by dotted name."""
    found = copy.deepcopy(dict(settings))
    for key, value in drawn.items():
        *path, last = key.split(".")
        place = found
        for part in path:
            place = place[part]
        place[last] = value
    return found


def _described_data(data: Mapping[str, Any], dataset: DomainDataset, splits: str) -> dict[str, Any]:
    """The settings that say what the data are, and hashes of what they hold."""
    found = {k: v for k, v in data.items() if k not in PLACES}
    if found.get("title") is None and dataset.name != found["name"]:
        found["title"] = dataset.name
    if splits == "official" and dataset.official is not None:
        found["splits"] = dataset.official.fingerprint()
    return found | {"content": dataset.fingerprint()}


def _described(model: ModelBuilder, dataset: DomainDataset) -> dict[str, str]:
    """What a function builds: its name and, since many are called `<lambda>`, its layers."""
    made = model(dataset.input_shape, len(dataset.classes))
    layers = [str(made), *(f"{k} {tuple(v.shape)}" for k, v in made.state_dict().items())]
    return {
        "name": getattr(model, "__qualname__", type(model).__qualname__),
        "layers": hashlib.sha256("\n".join(layers).encode()).hexdigest()[:8],
    }


def _folds(wanted: Any, dataset: DomainDataset) -> tuple[Fold, ...]:
    """The folds that `holdout` names, each once; the domains of two in the data set's order."""
    alone = tuple((name,) for name in dataset.names)
    if wanted == "all":
        return alone
    if wanted == "pairs":
        return (*alone, *itertools.combinations(dataset.names, 2))
    found = []
    for item in wanted if isinstance(wanted, list | tuple) else [wanted]:
        names = {str(name) for name in (item if isinstance(item, list | tuple) else [item])}
        fold = tuple(sorted(names, key=dataset.index))
        require(len(fold) in (1, 2), f"holdout={wanted}: a fold is one domain or two, not {item}")
        found.append(fold)
    require(bool(found), "holdout=[]: name at least one domain, or write holdout=all")
    return tuple(dict.fromkeys(found))


def _seeds(wanted: Any) -> tuple[int, ...]:
    fine = fits(wanted, list[int]) and wanted and min(wanted) >= 0 and max(wanted) < 2**32
    require(fine, f"seeds={wanted}: write a list of numbers from 0 on, such as seeds=[0,1,2]")
    return tuple(dict.fromkeys(wanted))
