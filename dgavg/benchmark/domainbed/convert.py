"""Runs of dgavg as runs of DomainBed, one for each candidate."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import md5
from typing import Any

from dgavg.benchmark.domainbed.names import algorithm_of, dataset_of
from dgavg.benchmark.domainbed.records import Record
from dgavg.benchmark.files import differences
from dgavg.benchmark.labels import labels
from dgavg.benchmark.results import Runs, domains_of, hparams_seed, protocol_of
from dgavg.errors import require, unknown

SAME = ("trainer", "data", "model", "optimizer", "protocol", "stopping", "precision", "init_seed")


@dataclass(frozen=True)
class ForeignRun:
    """A run in DomainBed's form: what its sweep would start it with, and its records."""

    train_args: Mapping[str, Any]
    records: tuple[Record, ...]

    @property
    def folder(self) -> str:
        """The name DomainBed's sweep gives the run's folder."""
        text = json.dumps(self.train_args, sort_keys=True)
        return md5(text.encode(), usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Conversion:
    """What runs of dgavg are to DomainBed, and what a reader should know of them."""

    runs: tuple[ForeignRun, ...]
    notes: tuple[str, ...]

    @property
    def records(self) -> list[Record]:
        """Those of all runs."""
        return [record for run in self.runs for record in run.records]


@dataclass(frozen=True)
class _Source:
    """One run of dgavg: the name of its folder, its records, and its data set."""

    name: str
    records: Sequence[Record]
    domains: tuple[str, ...]
    dataset: str
    label: str  # what tells its chain from the same one with other settings

    @property
    def head(self) -> Record:
        return self.records[0]

    @property
    def test_envs(self) -> list[int]:
        held_out = (self.head[key] for key in ("held_out", "held_out_with") if key in self.head)
        return sorted(self.domains.index(name) for name in held_out)


def convert(runs: Runs, candidates: Collection[str] | None = None) -> Conversion:
    """Convert the records of finished runs, of all `candidates` or of those named.

    - A candidate is an algorithm: the live weights of `irm_basic` are `IRM`, those of other chains
      have the chain's name, an average `ema` of either is `IRM:ema`. Runs of one chain with other
      settings have these in the name too; draws of one search are one algorithm.
    - Domains have their place in the data set; `environments` in each record names them.
    - `trial_seed` is our seed. A checkpoint after t updates has step t - 1, since DomainBed
      evaluates step s after its update, the (s + 1)-th; what a link did after training is one
      step later.
    - `env{i}_in_acc` and `env{i}_out_acc` are what they are in DomainBed, whatever our
      `protocol.test_split` is. The held-out `out` part, where it was not scored, is NaN: a key
      that is not there would end DomainBed's count of the domains. Training `in` parts that were
      not scored are left out, and so is `step_time`, since our clock counts evaluations too.

    Left out with a note are soups, ensembles, and runs without validation data: no rule of
    DomainBed can judge them. Raises `UserError` for an unknown candidate, for runs of one data set
    that differ in protocol or data, and where the same run is there twice.
    """
    usable, notes = _usable(runs)
    sources = list(_sources(usable))
    names = list(dict.fromkeys(c for s in sources for c in s.records[-1]["candidates"]))
    for wanted in candidates or ():
        if wanted not in names:
            raise unknown("candidate", wanted, names)
    wanted_names = names if candidates is None else candidates
    made = [
        _convert(source, candidate)
        for source in sources
        for candidate in source.records[-1]["candidates"]
        if candidate in wanted_names
    ]
    _check_once(sources)
    unscored = sum(any(map(math.isnan, _accuracies(run.records[-1]))) for run in made)
    if unscored:
        notes.append(
            f"{unscored} of {len(made)} runs did not score the validation part of their held-out "
            "domain, so the oracle can't choose among their hyper-parameters: train with "
            "evaluate=all"
        )
    return Conversion(tuple(made), tuple(notes))


def _usable(runs: Runs) -> tuple[Runs, list[str]]:
    """The runs that DomainBed has a form for, and how many it has none for."""
    found: Runs = {}
    made, blind = 0, 0
    for name, group in runs.items():
        for records in group:
            if "members" in records[0]:
                made += 1
            elif not records[0]["protocol"]["holdout_fraction"]:
                blind += 1
            else:
                found.setdefault(name, []).append(records)
    notes = []
    if made:
        notes.append(f"left out {made} soup(s) or ensemble(s): DomainBed has no form for them")
    if blind:
        notes.append(f"left out {blind} run(s) without validation data, which DomainBed selects by")
    require(bool(found), "; ".join(["no run to convert", *notes]))
    return found, notes


def _sources(runs: Runs) -> Iterator[_Source]:
    heads: dict[str, dict[tuple[str, str], tuple[str, Record]]] = {}  # by data set: chain, settings
    for name, group in runs.items():
        for records in group:
            head, dataset = records[0], dataset_of(records[0]["data"], domains_of(records[0]))
            same = heads.setdefault(dataset, {})
            first = next(iter(same.values()), (name, head))
            _check_alike(dataset, (name, head), first)
            same.setdefault((head["chain"], _variant(head)), (name, head))
    told = {dataset: _told_apart(same) for dataset, same in heads.items()}
    for name, group in runs.items():
        for records in group:
            head, domains = records[0], domains_of(records[0])
            dataset = dataset_of(head["data"], domains)
            label = told[dataset][head["chain"], _variant(head)]
            yield _Source(name, records, domains, dataset, label)


def _variant(head: Record) -> str:
    """The same text for runs that differ in fold, seed and drawn hyper-parameters alone."""
    group = head.get("search", {}).get("group")
    return group or json.dumps({key: head.get(key) for key in SAME}, sort_keys=True)


def _told_apart(same: Mapping[tuple[str, str], tuple[str, Record]]) -> dict[tuple[str, str], str]:
    """What runs of a chain have after its name: nothing, where all have the same settings."""
    found = {}
    for key in same:
        rivals = {k: same[k] for k in same if k[0] == key[0]}
        names = labels(dict(rivals.values())) if len(rivals) > 1 else {}
        found[key] = names.get(same[key][0], key[0]).removeprefix(key[0])
    return found


def _check_alike(dataset: str, one: tuple[str, Record], first: tuple[str, Record]) -> None:
    """Raise `UserError` for runs that a table must not show side by side."""
    for part in ("protocol", "data"):
        found = list(differences(_identity(one[1])[part], _identity(first[1])[part], part))
        require(
            not found,
            f"{one[0]} and {first[0]}, both of {dataset}, differ in {part} ({'; '.join(found)}): "
            "a table never mixes two of them; give folders of one",
        )


def _identity(head: Record) -> dict[str, Any]:
    """What runs of one data set of DomainBed share; names of data may differ, not what is in it."""
    return {"protocol": protocol_of(head), "data": {"content": head["data"].get("content")}}


def _check_once(sources: Iterable[_Source]) -> None:
    seen: dict[tuple[Any, ...], str] = {}
    for s in sources:
        chain, draw, trial = s.head["chain"] + s.label, hparams_seed(s.head), s.head["seed"]
        key = (s.dataset, chain, draw, trial, *s.test_envs)
        require(
            key not in seen,
            f"{seen.get(key)} and {s.name} both hold {chain} on {s.dataset}, held out "
            f"{s.head['held_out']}, seed {trial}, hparams_seed {draw}: give one of them",
        )
        seen[key] = s.name


def _convert(source: _Source, candidate: str) -> ForeignRun:
    head = source.head
    train_args = {
        "dataset": source.dataset,
        "algorithm": algorithm_of(head["chain"], head["trainer"], candidate, source.label),
        "test_envs": source.test_envs,
        "holdout_fraction": head["protocol"]["holdout_fraction"],
        "hparams_seed": hparams_seed(head),
        "data_dir": None,
        "task": "domain_generalization",
        "trial_seed": head["seed"],
        "seed": head["seed"],
        "steps": head["protocol"]["steps"],
    }
    run = ForeignRun(train_args, ())
    args = {
        **train_args,
        "checkpoint_freq": head["protocol"]["eval_every"],
        "hparams": None,
        "output_dir": run.folder,
        "save_model_every_checkpoint": False,
        "skip_model_save": True,
        "uda_holdout_fraction": 0,
    }
    shared = {"args": args, "hparams": _hparams(head), "environments": list(source.domains)}
    records = tuple(
        {**shared, **_record(record, candidate, source)}
        for record in source.records
        if candidate in record["candidates"]
    )
    return ForeignRun(train_args, records)


def _record(record: Record, candidate: str, source: _Source) -> dict[str, Any]:
    splits = record["candidates"][candidate]["splits"]
    require(
        f"{record['held_out']}/in" in splits,
        f"step {record['step']} of {record['chain']} was not scored on {record['held_out']!r}, as "
        "DomainBed's tables need it: train with evaluate=selection, not picked",
    )
    found: dict[str, Any] = {
        "step": record["step"] - (record.get("phase") != "after_fit"),
        "epoch": record.get("epoch"),
    }
    losses = record.get("losses") or {}
    found |= {("loss" if k == "total" else k): v for k, v in losses.items() if "/" not in k}
    for i, domain in enumerate(source.domains):
        for part in ("in", "out"):
            if f"{domain}/{part}" in splits:
                found[f"env{i}_{part}_acc"] = splits[f"{domain}/{part}"]["accuracy"]
        found.setdefault(f"env{i}_out_acc", math.nan)
    return found


def _accuracies(record: Record) -> list[float]:
    return [v for k, v in record.items() if k.startswith("env") and k.endswith("_acc")]


def _hparams(head: Record) -> dict[str, Any]:
    """The settings, flat, under DomainBed's names where it has them."""
    model, optimizer = head.get("model") or {}, head.get("optimizer") or {}
    named = {
        "lr": optimizer.get("lr"),
        "weight_decay": optimizer.get("weight_decay"),
        "batch_size": head["protocol"]["batch_size"],
        "resnet_dropout": model.get("dropout"),
        "resnet18": model.get("name") == "resnet18",
        "freeze_bn": model.get("freeze_bn"),
        "data_augmentation": head["protocol"]["augment"] != "none",
        "class_balanced": False,
        "nonlinear_classifier": False,
    }
    links = {
        f"{link}.{key}": value
        for link, settings in head["trainer"].items()
        for key, value in settings.items()
    }
    return {k: v for k, v in named.items() if v is not None} | links
