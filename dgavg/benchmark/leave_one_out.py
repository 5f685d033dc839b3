"""Leave one domain out: train a chain once for each fold and seed, and make the table."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dgavg.benchmark.experiment import Experiment, Fold, experiments
from dgavg.benchmark.fold import BusyError, is_free, run_fold
from dgavg.benchmark.progress import Watcher
from dgavg.benchmark.results import Runs
from dgavg.benchmark.table import Table
from dgavg.config import compose, explained, plain
from dgavg.data import DomainDataset
from dgavg.errors import UserError, require
from dgavg.losslog import NonFiniteLossError
from dgavg.models import Model
from dgavg.trainer import Trainer

ANY_TIME = (BusyError, NonFiniteLossError)  # errors that say nothing of how other runs begin
WAIT = 0.5  # seconds between two looks at a run that another process is training


@dataclass(frozen=True)
class Failure:
    """A run that could not be trained, and why."""

    experiment: Experiment
    fold: Fold
    seed: int
    error: Exception

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return self.experiment.run_folder(self.fold, self.seed)


def left(folder: Path) -> str:
    """What is said of a run that another process is training."""
    return f"another process is training in {folder}: left to it for now"


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
    todo = deque((e, fold, seed) for e in experiments for seed in e.seeds for fold in e.folds)
    first = experiments[0]
    found: dict[tuple[str, Fold, int], list[dict[str, Any]]] = {}
    busy: set[Path] = set()
    steps = first.protocol["steps"]
    with Watcher(first.spec, len(todo), steps, quiet=quiet, tell=tell) as watcher:
        for note in first.dataset.notes:
            watcher.note(note)
        while todo:
            experiment, fold, seed = todo.popleft()
            folder = experiment.run_folder(fold, seed)
            while folder in busy and not is_free(folder):
                time.sleep(WAIT)
            watcher.start(" and ".join(fold), seed)
            new = not (folder / "config.yaml").exists()
            try:
                records = run_fold(experiment, fold, seed, watcher)
            except Exception as error:
                mistake = isinstance(error, UserError) and not isinstance(error, ANY_TIME)
                hopeless = mistake and new and watcher.first < 0 and not (found or failures)
                if failures is None or hopeless or (strict and not isinstance(error, UserError)):
                    raise
                if patient and isinstance(error, BusyError):
                    if folder not in busy:
                        watcher.note(left(folder))
                    busy.add(folder)
                    todo.append((experiment, fold, seed))
                else:
                    failures.append(Failure(experiment, fold, seed, error))
                continue
            found[experiment.folder.name, fold, seed] = records
            watcher.end(records)
    runs: Runs = {}
    for experiment in experiments:
        name = experiment.folder.name
        keys = [(name, f, s) for f in experiment.folds for s in experiment.seeds]
        each = [found[key] for key in keys if key in found]
        if each:
            runs.setdefault(name, []).extend(each)
    return runs


def leave_one_domain_out(
    trainer: Trainer | str,
    data: DomainDataset | str = "digits_rotated",
    *,
    model: Callable[[tuple[int, int, int], int], Model] | str | None = None,
    optimizer: str | None = None,
    protocol: str | None = None,
    seeds: Sequence[int] | None = None,
    holdout: Sequence[str | int] | None = None,
    settings: Mapping[str, Any] | None = None,
    runs: str | Path = "runs",
    name: str | None = None,
    quiet: bool = False,
) -> Table:
    """Train `trainer` once for each held-out domain and seed; `print` the table that comes back.

    What `dgavg` does on the command line with the same settings, resumed and skipped alike.
    `trainer` is a chain or its name, `data` a data set or its name, `model` a name or a function of
    input shape (C, H, W) and number of classes. `settings` are those that `dgavg --cfg job` prints,
    by dotted name: `{"protocol.steps": 300, "optimizer.lr": 1e-3}`; `search` is a search space or
    the name of one.

    Raises `UserError` for whatever can't work.
    """
    groups = {
        "trainer": trainer,
        "data": data,
        "model": model,
        "optimizer": optimizer,
        "protocol": protocol,
    }
    values = {"seeds": seeds, "holdout": holdout, "runs": str(runs), "name": name}
    given = {k: v for k, v in values.items() if v is not None} | dict(settings or {})
    for key in given:
        group = key.partition(".")[0]
        require(
            isinstance(groups.get(group), str | None),
            f"settings {key!r}: {group} is an object here; give it its settings where it is made",
        )
    if isinstance(given.get("search"), str):
        groups["search"] = given.pop("search")
    with explained():
        config = compose([f"{k}={v}" for k, v in groups.items() if isinstance(v, str)])
        for key, value in given.items():
            value = list(value) if isinstance(value, tuple | range) else value
            OmegaConf.update(config, key, value, merge=key != "search", force_add=key == "search")
        composed = plain(config)
    found = experiments(
        composed,
        trainer=None if isinstance(trainer, str) else trainer,
        dataset=None if isinstance(data, str) else data,
        model=None if isinstance(model, str) else model,
    )
    return Table(run_experiments(found, quiet=quiet))
