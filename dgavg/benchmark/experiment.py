"""Experiment: everything that a set of leave-one-domain-out runs shares."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dgavg.benchmark.tensorboard import summary_writer
from dgavg.chain import chain, check, function_name, settings_of, spec_of
from dgavg.data import DomainDataset, load
from dgavg.errors import require, unknown
from dgavg.evaluation import RULES, Stopping
from dgavg.models import Model, build_model
from dgavg.optimizers import lr_schedule, optimizer_factory
from dgavg.run import PRECISIONS, OptimizerFactory
from dgavg.settings import check_type, fits
from dgavg.trainer import Trainer

PLACES = ("root", "download", "workers")  # where data is and how it is read, not what it is
ALSO = ("keep", "recalibrate")  # what any average can be scored by beside its own policy
ModelBuilder = Callable[[tuple[int, int, int], int], Model]


@dataclass(frozen=True)
class Experiment:
    """The folds and seeds to run, and all that their runs are built from.

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
    held_out: tuple[str, ...]
    seeds: tuple[int, ...]
    init_seed: int | None
    device: torch.device
    precision: str
    clip: float | None
    evaluate_all: bool
    eval_batch_size: int
    also_batchnorm: tuple[str, ...]
    threads: int | None
    tensorboard: bool
    identity: Mapping[str, Any]
    folder: Path

    @property
    def spec(self) -> str:
        """The chain by name."""
        return spec_of(self.trainer)

    def run_folder(self, held_out: str, seed: int) -> Path:
        """Where the run of one fold and seed lives."""
        return self.folder / held_out.replace(os.sep, "_") / str(seed)


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
    _check_functions(trainer)
    protocol, stopping = dict(settings["protocol"]), Stopping(**settings["stopping"])
    check_choices(settings, protocol)
    _check_stopping(trainer, stopping)
    if protocol["holdout_fraction"] == 0:
        _check_without_validation(trainer, stopping, protocol["selection"])
    device = find_device(settings["device"])
    init_seed = settings["init_seed"]
    require(
        init_seed is None or 0 <= init_seed < 2**32,
        f"init_seed={init_seed}: a number from 0 on, or null",
    )
    optimizer = dict(settings["optimizer"])
    shape, warmup = optimizer.pop("schedule", "constant"), optimizer.pop("warmup", 0)
    check_type(shape, str, "optimizer.schedule")
    check_type(warmup, int, "optimizer.warmup")
    schedule = lr_schedule(shape, warmup, protocol["steps"])
    clip = optimizer.pop("clip", None)
    check_type(clip, float | None, "optimizer.clip")
    require(clip is None or clip > 0, f"optimizer.clip={clip}: a number above 0, or null")
    check(trainer, steps=protocol["steps"])
    make_optimizer = optimizer_factory(**optimizer)

    data = dict(settings["data"]) if dataset is None else {"name": dataset.name}
    if dataset is None:
        dataset = load(data["name"], **{k: v for k, v in data.items() if k != "name"})
    held_out = _held_out(settings["holdout"], dataset)
    check(trainer, domains=len(dataset.domains) - 1)
    data = {k: v for k, v in data.items() if k not in PLACES}
    build_one = model or (
        lambda shape, classes: build_model(input_shape=shape, classes=classes, **settings["model"])
    )
    identity = {
        "trainer": settings_of(trainer),
        "data": {**data, "content": fingerprint(dataset)},
        "model": settings["model"] if model is None else _described(build_one, dataset),
        **{k: settings[k] for k in ("optimizer", "protocol", "stopping", "precision", "evaluate")},
        "eval_batch_size": settings["eval_batch_size"],  # batch norm is recalibrated by the batch
        "device": device.type,
    }
    if init_seed is not None:  # runs without it keep their names
        identity["init_seed"] = init_seed
    if settings["also_batchnorm"]:
        identity["also_batchnorm"] = settings["also_batchnorm"]
    identity = json.loads(json.dumps(identity, default=list))
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:8]
    name = settings["name"] or f"{spec_of(trainer)}-{dataset.name}-{digest}".replace(os.sep, "_")
    require(name not in (".", "..") and os.sep not in name, f"name={name!r}: not a folder name")
    return Experiment(
        trainer=trainer,
        dataset=dataset,
        model=build_one,
        optimizer=make_optimizer,
        schedule=schedule,
        protocol=protocol,
        stopping=stopping,
        held_out=held_out,
        seeds=_seeds(settings["seeds"]),
        init_seed=init_seed,
        device=device,
        precision=settings["precision"],
        clip=clip,
        evaluate_all=settings["evaluate"] == "all",
        eval_batch_size=settings["eval_batch_size"],
        also_batchnorm=tuple(settings["also_batchnorm"]),
        threads=settings["threads"],
        tensorboard=settings["logger"] == "tensorboard",
        identity=identity,
        folder=Path(settings["runs"]) / name,
    )


def find_device(name: str) -> torch.device:
    """The device called `name`; `auto` is a GPU where there is one.

    Raises `UserError` for one that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise unknown("device", name, ["auto", "cpu", "cuda", "cuda:1", "mps"]) from None
    count = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }
    there = count.get(device.type, 0)
    what = f"there are {there}, counted from 0" if there else "there is no such device here"
    require((device.index or 0) < there, f"device={name}: {what}; write device=auto or device=cpu")
    return device


def fingerprint(dataset: DomainDataset) -> str:
    """A hash of a data set's content: names, images and labels, wherever its files are."""
    found = hashlib.blake2b(repr((dataset.names, dataset.classes)).encode(), digest_size=8)
    for domain in dataset.domains:
        for tensor in (domain.images, domain.labels):
            found.update(repr(tuple(tensor.shape)).encode())
            found.update(tensor.cpu().contiguous().numpy().data)
    return found.hexdigest()


def _described(model: ModelBuilder, dataset: DomainDataset) -> dict[str, str]:
    """What a function builds: its name and, since many are called `<lambda>`, its layers."""
    made = model(dataset.input_shape, len(dataset.classes))
    layers = [str(made), *(f"{k} {tuple(v.shape)}" for k, v in made.state_dict().items())]
    return {
        "name": getattr(model, "__qualname__", type(model).__qualname__),
        "layers": hashlib.sha256("\n".join(layers).encode()).hexdigest()[:8],
    }


def check_choices(settings: Mapping[str, Any], protocol: Mapping[str, Any]) -> None:
    """Raise `UserError` for a setting that is none of its choices, or below what it may be."""
    for value, choices, name in (
        (protocol["test_split"], ("in", "all"), "protocol.test_split"),
        (protocol["selection"], tuple(RULES), "protocol.selection"),
        (settings["precision"], tuple(PRECISIONS), "precision"),
        (settings["evaluate"], ("selection", "all"), "evaluate"),
        (settings["logger"], (None, "tensorboard"), "logger"),
    ):
        shown = ", ".join("null" if c is None else c for c in choices)
        require(value in choices, f"{name}={value}: choose one of {shown}")
    for policy in settings["also_batchnorm"]:
        if policy not in ALSO:
            raise unknown("batch-norm policy", policy, ALSO, "also_batchnorm")
    if settings["logger"] == "tensorboard":
        summary_writer()  # is it there?
    for key in ("steps", "batch_size", "eval_every"):
        require(protocol[key] > 0, f"protocol.{key}={protocol[key]}: at least 1")
    size, threads = settings["eval_batch_size"], settings["threads"]
    require(size > 0, f"eval_batch_size={size}: at least 1")
    require(threads is None or threads > 0, f"threads={threads}: at least 1, or null")


def _check_stopping(trainer: Trainer, stopping: Stopping) -> None:
    known = ["live", *(name for link in trainer for name in link.candidate_names())]
    if stopping.candidate is not None and stopping.candidate not in known:
        where = f"the chain {spec_of(trainer)!r} (stopping.candidate)"
        raise unknown("candidate", stopping.candidate, known, where)


def _check_without_validation(trainer: Trainer, stopping: Stopping, selection: str) -> None:
    """Refuse what reads validation data where `protocol.holdout_fraction=0` leaves none."""
    none = "protocol.holdout_fraction=0 leaves no validation data"
    require(selection == "last", f"{none} to select by: write protocol.selection=last")
    require(stopping.candidate is None, f"{none} to stop by: write stopping.candidate=null")
    needy = [link.name for link in trainer if link.needs_validation()]
    require(not needy, f"{none}, which {', '.join(needy)} in {spec_of(trainer)!r} decides by")


def _check_functions(trainer: Trainer) -> None:
    """Records name a setting that is a function by its name, so it needs one of its own."""
    for link in trainer:
        for key, value in link.settings().items():
            name = function_name(value) if callable(value) else ""
            require(
                "<" not in name,
                f"trainer.{link.name}.{key} is {name}: records could not tell it from another; "
                "give it a name, as a function of a module",
            )


def _held_out(wanted: Any, dataset: DomainDataset) -> tuple[str, ...]:
    if wanted == "all":
        return dataset.names
    names = wanted if isinstance(wanted, list | tuple) else [wanted]
    require(bool(names), "holdout=[]: name at least one domain, or write holdout=all")
    for name in names:
        dataset.index(str(name))
    return tuple(dict.fromkeys(map(str, names)))


def _seeds(wanted: Any) -> tuple[int, ...]:
    fine = fits(wanted, list[int]) and wanted and min(wanted) >= 0 and max(wanted) < 2**32
    require(fine, f"seeds={wanted}: write a list of numbers from 0 on, such as seeds=[0,1,2]")
    return tuple(dict.fromkeys(wanted))
