"""Leave one domain out: train a chain once for each fold and seed, and make the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dgavg.benchmark.campaign import run_experiments
from dgavg.benchmark.experiment import experiments
from dgavg.benchmark.table import Table
from dgavg.config import compose, explained, plain
from dgavg.data import DomainDataset
from dgavg.distributed import together
from dgavg.errors import require
from dgavg.models import Model
from dgavg.trainer import Trainer


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
