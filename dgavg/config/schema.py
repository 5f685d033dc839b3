"""The types of the configuration; the values stand in `conf/`."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from typing import Any, get_type_hints

from omegaconf import MISSING as REQUIRED

from dgavg.trainer import Trainer, may_be_scheduled


@dataclass
class ProtocolSettings:
    """How runs are trained, split, evaluated and selected; a table never mixes two of them.

    - `name`: of the protocol, written into every record.
    - `steps`: updates a run.
    - `batch_size`: images of each training domain a step.
    - `eval_every`: steps between two evaluations; the last step is always evaluated.
    - `first_eval`: the step of the first evaluation; null is `eval_every`.
    - `holdout_fraction`: share of each domain kept for validation.
    - `test_split`: `in` scores the held-out domain's larger part, as DomainBed; `all` its whole.
    - `selection`: `validation`, `last`, `loo`, `oracle` or `oracle_best`.
    - `splits`: `domainbed` draws them from the seed, `official` takes the lists of the data set.
    - `augment`: augmentation of training images, `none` or `domainbed`.
    """

    name: str = REQUIRED
    steps: int = REQUIRED
    batch_size: int = REQUIRED
    eval_every: int = REQUIRED
    first_eval: int | None = REQUIRED
    holdout_fraction: float = REQUIRED
    test_split: str = REQUIRED
    selection: str = REQUIRED
    augment: str = REQUIRED
    splits: str = REQUIRED


@dataclass
class StoppingSettings:
    """Early stopping; see `dgavg.evaluation.Stopping`."""

    candidate: str | None = REQUIRED
    patience: int = REQUIRED


@dataclass
class Settings:
    """Everything `dgavg` takes; `dgavg --cfg job` prints it composed."""

    trainer: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    protocol: ProtocolSettings = field(default_factory=ProtocolSettings)
    stopping: StoppingSettings = field(default_factory=StoppingSettings)
    search: dict[str, Any] = field(default_factory=dict)
    hparams_seed: int = REQUIRED
    holdout: Any = REQUIRED
    seeds: Any = REQUIRED
    init_seed: int | None = REQUIRED
    device: str = REQUIRED
    precision: str = REQUIRED
    scoring: str | None = REQUIRED
    compile: Any = REQUIRED
    threads: int | None = REQUIRED
    stack: int = REQUIRED
    evaluate: str = REQUIRED
    candidates: list[str] | None = REQUIRED
    eval_batch_size: int = REQUIRED
    also_batchnorm: list[str] = REQUIRED
    logger: str | None = REQUIRED
    runs: str = REQUIRED
    name: str | None = REQUIRED


def link_schema(cls: type[Trainer]) -> type:
    """A typed config of a link's settings, read off its fields: Python's defaults are the only."""
    kinds = get_type_hints(cls)
    settings = []
    for f in fields(cls):
        if f.init and f.name != "inner":
            kind = kinds[f.name]
            simple = kind in (int, float, str, bool, int | None, float | None, str | None)
            simple &= not may_be_scheduled(cls, f.name)
            default = field(default=REQUIRED if f.default is MISSING else f.default)
            if f.default_factory is not MISSING:
                default = field(default_factory=f.default_factory)
            settings.append((f.name, kind if simple else Any, default))
    return make_dataclass(cls.__name__, settings)
