"""One run: a fold and a seed, from its folder or from the start, to its `done`."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from torch import nn
from yaml import YAMLError  # type: ignore[import-untyped]

from dgavg.benchmark.experiment import Experiment, Fold
from dgavg.benchmark.files import (
    differences,
    load_checkpoint,
    read_records,
    record_line,
    save_checkpoint,
    save_weights,
)
from dgavg.benchmark.scored import splits_to_score
from dgavg.benchmark.tensorboard import EventFiles
from dgavg.chain import adapt, renew
from dgavg.data import DomainDataset, TrainingBatches, make_splits
from dgavg.disk import make_folder, write_text, writing
from dgavg.errors import UserError, require
from dgavg.evaluation import Scorer, selected_step
from dgavg.evaluation.scoring import SplitScore
from dgavg.fit import fit
from dgavg.losslog import NonFiniteLossError
from dgavg.run import Run
from dgavg.seeding import random_state, seed_everything, set_random_state
from dgavg.trainer import Candidate, Scores

# What a record names beside the chain: all that its numbers come from.
SETTINGS = (
    "trainer",
    "data",
    "model",
    "optimizer",
    "protocol",
    "stopping",
    "precision",
    "device",
    "init_seed",
    "also_batchnorm",
    "search",
    "changed",
)

Watch = Callable[[Run], None]
THREADS = torch.get_num_threads()  # torch's own choice, from the machine and OMP_NUM_THREADS


def run_fold(
    experiment: Experiment, fold: Fold, seed: int, watch: Watch = lambda run: None
) -> list[dict[str, Any]]:
    """Train with `fold` left out, or go on where a killed run stopped; returns the records.

    A run that is done is only read. Raises `UserError` where its folder holds a run of other
    settings, and `BusyError` where another process is at work in it; what can't be trained leaves
    no folder.
    """
    folder = experiment.run_folder(fold, seed)
    settings = {**experiment.identity, "dataset": described(experiment.dataset)}
    settings |= _left_out(fold) | {"seed": seed}
    check_same(folder, settings)
    if not (folder / "done").exists():
        threads = torch.get_num_threads()
        try:
            one = _Fold(experiment, fold, seed, folder, settings)
            with locked(folder):
                check_same(folder, settings)  # again: nobody else can write it now
                if not (folder / "config.yaml").exists():
                    write_text(folder / "config.yaml", OmegaConf.to_yaml(settings))
                one.train(watch)
        finally:
            torch.set_num_threads(threads)
    return read_records(folder / "records.jsonl")


def _left_out(fold: Fold) -> dict[str, str]:
    """What settings and records say of a fold."""
    return dict(zip(("held_out", "held_out_with"), fold, strict=False))


class BusyError(UserError):
    """Another process is at work in the folder of a run."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder and keep other processes out of it.

    Raises `BusyError` where another one is at work there.
    """
    make_folder(folder)
    lock = FileLock(folder / ".lock")
    with writing(folder):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            message = f"another process is training in {folder}; wait for it to end"
            raise BusyError(message) from None
    with lock:
        yield


def is_free(folder: Path) -> bool:
    """Whether no process is at work in the folder of a run."""
    try:
        with locked(folder):
            return True
    except BusyError:
        return False


def check_same(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise `UserError` where the folder's `config.yaml` says other settings, or nothing."""
    if not (folder / "config.yaml").exists():
        return
    found = list(differences(settings, read_config(folder)))
    require(
        not found,
        f"{folder} holds a run with other settings ({'; '.join(found[:3])}): choose another "
        "name=..., or delete that folder",
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.yaml` of a run.

    Raises `UserError` where it is damaged.
    """
    path = folder / "config.yaml"
    found: Any = None
    with suppress(OSError, ValueError, YAMLError):
        found = OmegaConf.to_container(OmegaConf.load(path))
    if not isinstance(found, dict) or "trainer" not in found:
        raise UserError(
            f"{path} is damaged or not of dgavg; delete {folder} to train that run anew"
        )
    return found


def described(dataset: DomainDataset) -> dict[str, Any]:
    """What whoever uses the weights of a run must know of the data they were trained on."""
    return {
        "domains": list(dataset.names),
        "classes": list(dataset.classes),
        "input_shape": list(dataset.input_shape),
    }


@dataclass
class _Clock:
    """Seconds of training, over all the times a run was started."""

    spent: float = 0.0
    start: float = 0.0

    def __post_init__(self) -> None:
        self.start = time.perf_counter()

    def read(self) -> float:
        return self.spent + time.perf_counter() - self.start


def threads_for(model: nn.Module) -> int:
    """Threads for a model on a CPU: small matrix products lose more to threads than they gain."""
    convolutional = any(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules())
    return THREADS if convolutional else 1


def _initial_model(experiment: Experiment, domains: int) -> nn.Module:
    """A model with the weights of `init_seed`, if any; all later draws are the run's own.

    `domains` is how many are trained on.
    """
    shape, classes = experiment.dataset.input_shape, len(experiment.dataset.classes)
    if experiment.init_seed is None:
        return experiment.model(shape, classes)
    before = random_state(experiment.device)
    seed_everything(experiment.init_seed)
    model = experiment.model(shape, classes)
    adapt(experiment.trainer, model, domains)
    set_random_state(before, experiment.device)
    return model


def _by_policies(
    candidates: Mapping[str, Candidate], policies: Sequence[str]
) -> Iterator[tuple[str, Candidate]]:
    """Candidates, each average followed by itself under the other batch-norm `policies`."""
    for name, candidate in candidates.items():
        yield name, candidate
        if name == "live" or candidate.probe:
            continue
        for policy in policies:
            if policy != candidate.batchnorm:
                yield f"{name}@{policy}", replace(candidate, batchnorm=policy)


class _Fold:
    """Builds the run of one fold and writes what it leaves."""

    def __init__(
        self,
        experiment: Experiment,
        fold: Fold,
        seed: int,
        folder: Path,
        settings: Mapping[str, Any],
    ) -> None:
        self.experiment, self.fold, self.seed, self.folder = experiment, fold, seed, folder
        self.settings = settings
        self.records: list[dict[str, Any]] = []
        self.lines: list[str] = []
        protocol, dataset = experiment.protocol, experiment.dataset
        seed_everything(seed)
        held_out = [dataset.index(name) for name in fold]
        splits = make_splits(
            dataset, protocol["holdout_fraction"], trial_seed=seed, kind=protocol["splits"]
        )
        self.batches = TrainingBatches(
            dataset,
            splits,
            [i for i in range(len(dataset.domains)) if i not in held_out],
            batch_size=protocol["batch_size"],
            seed=seed,
            device=experiment.device,
            augment=protocol["augment"],
        )
        model = _initial_model(experiment, len(dataset.domains) - len(fold))
        torch.set_num_threads(experiment.threads or threads_for(model))
        model.to(experiment.device)
        model.train()
        self.run = Run(
            renew(experiment.trainer),
            model,
            self.batches,
            steps=protocol["steps"],
            optimizer=experiment.optimizer,
            schedule=experiment.schedule,
            evaluate=self._evaluate,
            eval_every=protocol["eval_every"],
            first_eval=protocol["first_eval"],
            stopping=experiment.stopping,
            precision=experiment.precision,
            clip=experiment.clip,
            seed=seed,
        )
        self.scorer = Scorer(
            model,
            splits_to_score(
                dataset,
                splits,
                held_out,
                protocol,
                self.run.device,
                every=experiment.evaluate_all,
            ),
            lambda: self.batches.pooled(experiment.eval_batch_size),
            batch_size=experiment.eval_batch_size,
            forward=lambda twin, images: self.run.forward(images, twin)[1],
            held_out=frozenset(f"{name}/{part}" for name in fold for part in ("in", "out")),
        )
        self.clock = _Clock()
        self.events: EventFiles | None = None

    def train(self, watch: Watch) -> None:
        """Train to the end; then, and only then, write `done`."""
        make_folder(self.folder / "weights")
        checkpoint = self.folder / "checkpoint.pt"
        if checkpoint.exists():
            self._resume(checkpoint)
        write_text(self.folder / "records.jsonl", "".join(self.lines))
        if self.experiment.tensorboard:
            self.events = EventFiles(self.folder / "tensorboard", self.records)
        try:
            fit(self.run, after_step=watch, after_eval=lambda run: self._save())
        except NonFiniteLossError as error:
            good = (
                f"the last good checkpoint, of step {self.records[-1]['step']}, is {checkpoint}"
                if self.records
                else "no checkpoint had been written yet"
            )
            where = f"hold out {' and '.join(self.fold)}, seed {self.seed}"
            raise NonFiniteLossError(f"{error} ({where}; {good})") from None
        finally:
            if self.events is not None:
                self.events.close()
        write_text(self.folder / "done", "done")

    def _resume(self, checkpoint: Path) -> None:
        saved = load_checkpoint(checkpoint)
        found = list(differences(self.settings, saved["settings"]))
        require(
            not found,
            f"{checkpoint} is of a run with other settings ({'; '.join(found[:3])}); "
            "delete it to start this run anew",
        )
        torch.set_num_threads(saved["threads"])  # sums depend on how they are split
        self.run.load_state_dict(saved["run"])
        self.lines = list(saved["records"])
        self.records = [json.loads(line) for line in self.lines]
        self.clock = _Clock(spent=saved["seconds"])

    def _save(self) -> None:
        content = {
            "settings": self.settings,
            "run": self.run.state_dict(),
            "records": self.lines,
            "seconds": self.clock.read(),
            "threads": torch.get_num_threads(),
        }
        save_checkpoint(self.folder / "checkpoint.pt", content)

    def _evaluate(self, run: Run) -> Scores:
        """Score, record, keep the weights that selection would pick; return validation alone."""
        candidates = dict(_by_policies(run.candidates(), self.experiment.also_batchnorm))
        # what `after_fit` leaves as it is need not be scored twice
        again = run.t == run.steps and bool(run.taps["after_fit"]) and not run.closed
        scores = self.scorer.score(candidates, keep=again)
        record = {
            "step": run.t,
            "phase": "after_fit" if run.closed else "fit",
            "epoch": run.t / run.epoch_length,
            **_left_out(self.fold),
            "seed": self.seed,
            "chain": self.experiment.spec,
            **{key: self.settings[key] for key in SETTINGS if key in self.settings},
            "lr": run.optimizer.param_groups[0]["lr"],
            "losses": run.losses.read(),
            "candidates": {
                name: {
                    "batchnorm": candidates[name].batchnorm,
                    "splits": {split: asdict(score) for split, score in found.items()},
                }
                for name, found in scores.items()
                if not candidates[name].probe
            },
            "timing": {"seconds": self.clock.read()},
        }
        validation = {}
        if self.experiment.protocol["holdout_fraction"]:
            validation = {name: self._validation(found) for name, found in scores.items()}
            self._check_finite("validation loss", validation["live"]["loss"])
        else:
            self._check_finite("training loss", self._training_loss())
        self._write(record, {k for k, c in candidates.items() if not c.members})
        return validation

    @torch.no_grad()
    def _training_loss(self) -> float:
        """Of the live weights, on one batch."""
        batch = self.run.batches(self.run.t)
        logits = self.scorer.logits("live", batch.x)
        return F.cross_entropy(logits, batch.y).item()

    def _check_finite(self, what: str, loss: float) -> None:
        """Stop before the checkpoint where the last update blew the weights up."""
        if not math.isfinite(loss):
            raise NonFiniteLossError(
                f"step {self.run.t}: the {what} of the live weights is {loss}; "
                "try a lower optimizer.lr or a smaller weight"
            )

    def _write(self, record: dict[str, Any], with_weights: set[str]) -> None:
        line = record_line(record)
        self.lines.append(line)
        self.records.append(json.loads(line))
        rule = self.experiment.protocol["selection"]
        for name in record["candidates"]:
            picked = selected_step(self.records, name, rule)
            last = picked in (None, len(self.records) - 1)  # None: other runs decide, by `loo`
            if last and name in with_weights:  # averaged predictions are no single weights
                notes = {"chain": record["chain"], "candidate": name, "step": str(record["step"])}
                path = self.folder / "weights" / f"{name}.safetensors"
                save_weights(path, self.scorer.weights(name), notes)
        write_text(self.folder / "records.jsonl", "".join(self.lines))
        if self.events is not None:
            self.events.write(self.records[-1])

    def _validation(self, found: dict[str, SplitScore]) -> dict[str, float]:
        """Means over the validation parts of the training domains: all that training may see."""
        mine = [v for k, v in found.items() if k in {f"{n}/out" for n in self.batches.names}]
        return {
            "accuracy": sum(s.accuracy for s in mine) / len(mine),
            "loss": sum(s.loss for s in mine) / len(mine),
        }
