"""Leave one domain out: train a chain once for each fold and seed, and make the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dgavg.allocator import keep_memory
from dgavg.benchmark.experiment import Experiment, Fold, experiments
from dgavg.benchmark.fold import run_fold
from dgavg.benchmark.progress import Watcher
from dgavg.benchmark.results import Runs
from dgavg.benchmark.stacked import run_stack, stacks
from dgavg.benchmark.table import Table
from dgavg.config import compose, explained, plain
from dgavg.data import DomainDataset
from dgavg.distributed import together
from dgavg.errors import require
from dgavg.models import Model
from dgavg.trainer import Trainer


def run_experiments(experiments: Sequence[Experiment], *, quiet: bool = False) -> Runs:
    """Run every fold and seed that is not done yet; returns the records of them all."""
    folds = [(e, fold, seed) for e in experiments for seed in e.seeds for fold in e.folds]
    first = experiments[0]
    if first.device.type == "cpu":
        keep_memory()
    found: dict[tuple[str, Fold, int], list[dict[str, Any]]] = {}

    def end(experiment: Experiment, fold: Fold, seed: int) -> None:
        records = run_fold(experiment, fold, seed, watcher)
        found[experiment.folder.name, fold, seed] = records
        watcher.end(records)

    with Watcher(first.spec, len(folds), first.protocol["steps"], quiet=quiet) as watcher:
        for note in first.dataset.notes:
            watcher.note(note)
        for experiment in experiments if first.stack > 1 else ():
            for members in stacks(experiment):
                watcher.start(f"{len(members)} runs", at_once=len(members))
                run_stack(experiment, members, watcher)
                for fold, seed in members:
                    watcher.name(label(fold, seed))
                    end(experiment, fold, seed)
        for experiment, fold, seed in folds:
            if (experiment.folder.name, fold, seed) not in found:
                watcher.start(label(fold, seed))
                end(experiment, fold, seed)
    runs: Runs = {}
    for experiment in experiments:
        name = experiment.folder.name
        each = [found[name, f, s] for f in experiment.folds for s in experiment.seeds]
        runs.setdefault(name, []).extend(each)
    return runs


def label(fold: Fold, seed: int) -> str:
    """A run as messages name it."""
    return f"hold out {' and '.join(fold)}, seed {seed}"


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
    the name of one. In processes that `torchrun` started each run trains on all of them, and each
    gets the table.

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
    with together():
        found = experiments(
            composed,
            trainer=None if isinstance(trainer, str) else trainer,
            dataset=None if isinstance(data, str) else data,
            model=None if isinstance(model, str) else model,
        )
        return Table(run_experiments(found, quiet=quiet))
