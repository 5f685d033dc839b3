"""Leave one domain out: train a chain once for each fold and seed, and make the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dgavg.benchmark.experiment import Experiment, build
from dgavg.benchmark.fold import run_fold
from dgavg.benchmark.progress import Watcher
from dgavg.benchmark.table import Runs, Table
from dgavg.config import compose, explained, plain
from dgavg.data import DomainDataset
from dgavg.errors import require
from dgavg.models import Model
from dgavg.trainer import Trainer


def run_experiment(experiment: Experiment, *, quiet: bool = False) -> Runs:
    """Run every fold and seed that is not done yet; returns the records of them all."""
    folds = [(h, s) for s in experiment.seeds for h in experiment.held_out]
    found = {}
    with Watcher(experiment.spec, len(folds), experiment.protocol["steps"], quiet=quiet) as watcher:
        for note in experiment.dataset.notes:
            watcher.note(note)
        for held_out, seed in folds:
            watcher.start(held_out, seed)
            found[held_out, seed] = run_fold(experiment, held_out, seed, watcher)
            watcher.end(found[held_out, seed])
    ordered = [found[h, s] for h in experiment.held_out for s in experiment.seeds]
    return {experiment.folder.name: ordered}


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
    by dotted name: `{"protocol.steps": 300, "optimizer.lr": 1e-3}`.

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
    with explained():
        config = compose([f"{k}={v}" for k, v in groups.items() if isinstance(v, str)])
        for key, value in given.items():
            OmegaConf.update(
                config, key, list(value) if isinstance(value, tuple | range) else value
            )
        composed = plain(config)
    experiment = build(
        composed,
        trainer=None if isinstance(trainer, str) else trainer,
        dataset=None if isinstance(data, str) else data,
        model=None if isinstance(model, str) else model,
    )
    return Table(run_experiment(experiment, quiet=quiet))
