"""All runs of some experiments: in their order, one after the other or several side by side."""

from __future__ import annotations

import gc
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dgavg.allocator import keep_memory
from dgavg.benchmark.experiment import Experiment, Fold, run_label
from dgavg.benchmark.files import read_records
from dgavg.benchmark.fold import run_fold
from dgavg.benchmark.folder import BusyError, is_free
from dgavg.benchmark.progress import Watcher
from dgavg.benchmark.results import Runs
from dgavg.benchmark.stacked import Member, run_stack, stacks
from dgavg.distributed import ranks
from dgavg.errors import UserError
from dgavg.losslog import NonFiniteLossError

ANY_TIME = (BusyError, NonFiniteLossError)  # errors that say nothing of how other runs begin
WAIT = 0.5  # seconds between two looks at a run that another process is training


@dataclass(frozen=True)
class Failure:
    """A run that could not be trained, and why."""

    experiment: Experiment
    fold: Fold
    seed: int
    error: Exception
    traceback: str

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return self.experiment.run_folder(self.fold, self.seed)


def left(folder: Path) -> str:
    """What is said of a run that another process is training."""
    return f"another process is training in {folder}: left to it for now"


@dataclass(frozen=True)
class _Unit:
    """Runs that are trained together: one, or those of a stack."""

    experiment: Experiment
    members: tuple[Member, ...]

    @property
    def folders(self) -> list[Path]:
        return [self.experiment.run_folder(*member) for member in self.members]

    @property
    def stacked(self) -> bool:
        return self.experiment.stack > 1 and not all((f / "done").exists() for f in self.folders)


def run_experiments(
    experiments: Sequence[Experiment],
    *,
    quiet: bool = False,
    tell: Callable[[str], None] | None = None,
    failures: list[Failure] | None = None,
    patient: bool = True,
    strict: bool = False,
) -> Runs:
    """Run every fold and seed that is not done yet; returns the records of them all.

    What fails is raised, or, with a list of `failures`, added to it: the others go on, unless the
    first can't even begin, since then none can. With such a list, a run that another process is
    training is left to it and, if `patient`, waited for at the end. `strict` raises what
    no user can mend all the same. `quiet` and `tell` are of `Watcher`.
    """
    first = experiments[0]
    strict = strict or ranks() > 1  # who fails alone leaves the others in the middle of a message
    if first.device.type == "cpu":
        keep_memory()
    todo = deque(unit for experiment in experiments for unit in _units(experiment))
    found: dict[tuple[str, Fold, int], list[dict[str, Any]]] = {}
    busy: set[Path] = set()
    number, steps = sum(len(unit.members) for unit in todo), first.protocol["steps"]
    with Watcher(first.spec, number, steps, quiet=quiet, tell=tell) as watcher:
        for note in first.dataset.notes:
            watcher.note(note)
        while todo:
            unit = todo.popleft()
            for folder in busy.intersection(unit.folders):
                while not is_free(folder):
                    time.sleep(WAIT)
            new = not any((folder / "config.yaml").exists() for folder in unit.folders)
            try:
                for fold, seed, records in _trained(unit, watcher):
                    found[unit.experiment.folder.name, fold, seed] = records
                    watcher.end(records)
            except Exception as error:
                mistake = isinstance(error, UserError) and not isinstance(error, ANY_TIME)
                hopeless = mistake and new and watcher.first < 0 and not (found or failures)
                if failures is None or hopeless or (strict and not isinstance(error, UserError)):
                    raise
                if len(unit.members) > 1 and isinstance(error, NonFiniteLossError):
                    alone = [_Unit(unit.experiment, (member,)) for member in unit.members]
                    todo.extendleft(reversed(alone))  # so that one takes no other with it
                elif patient and isinstance(error, BusyError):
                    if not busy.intersection(unit.folders):
                        watcher.note(left(unit.folders[0]))
                    busy.update(unit.folders)
                    todo.append(unit)
                else:
                    text = let_go(error)
                    failures += [Failure(unit.experiment, *m, error, text) for m in unit.members]
    runs: Runs = {}
    for experiment in experiments:
        name = experiment.folder.name
        keys = [(name, f, s) for f in experiment.folds for s in experiment.seeds]
        each = [found[key] for key in keys if key in found]
        if each:
            runs.setdefault(name, []).extend(each)
    return runs


def _units(experiment: Experiment) -> Iterator[_Unit]:
    """What is to be done: stacks first, then each run that is in none."""
    together = [tuple(s) for s in stacks(experiment)] if experiment.stack > 1 else []
    yield from (_Unit(experiment, members) for members in together)
    for seed in experiment.seeds:
        for fold in experiment.folds:
            if not any((fold, seed) in members for members in together):
                yield _Unit(experiment, ((fold, seed),))


def _trained(unit: _Unit, watcher: Watcher) -> Iterator[tuple[Fold, int, list[dict[str, Any]]]]:
    """Train the runs of a unit and give the records of each."""
    stacked = unit.stacked
    if stacked:
        watcher.start(f"{len(unit.members)} runs", at_once=len(unit.members))
        note = watcher.note if watcher.done == 0 else lambda text: None  # once
        with memory_explained(unit.experiment):
            run_stack(unit.experiment, unit.members, watcher, note)
    for (fold, seed), folder in zip(unit.members, unit.folders, strict=True):
        label = run_label(fold, seed)
        if stacked:
            watcher.name(label)
            yield fold, seed, read_records(folder / "records.jsonl")
        else:
            watcher.start(label)
            with memory_explained(unit.experiment):
                records = run_fold(unit.experiment, fold, seed, watcher)
            yield fold, seed, records


def let_go(error: Exception) -> str:
    """The traceback of an error as text; the error itself then holds no run and no model."""
    text = "".join(traceback.format_exception(error))
    error.__traceback__ = error.__cause__ = error.__context__ = None
    gc.collect()  # a run and its links know each other
    return text


@contextmanager
def memory_explained(experiment: Experiment) -> Iterator[None]:
    """Raise `UserError` where the device has not the memory for a run."""
    try:
        yield
    except torch.OutOfMemoryError:
        sizes = {
            "stack": experiment.stack,
            "protocol.batch_size": experiment.protocol["batch_size"],
            "eval_batch_size (for recalibrated batch norm)": experiment.eval_batch_size,
        }
        lower = ", ".join(f"{key} below {size}" for key, size in sizes.items() if size > 1)
        bf16 = "write precision=bf16, or " if experiment.precision == "fp32" else ""
        raise UserError(
            f"{experiment.device} has too little memory for this: {bf16}lower one of {lower}"
        ) from None
