"""One run: a fold and a seed, from its folder or from the start, to its `done`."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from torch import nn
from yaml import YAMLError  # type: ignore[import-untyped]

from dgavg.benchmark.experiment import Experiment
from dgavg.benchmark.files import (
    differences,
    load_checkpoint,
    make_folder,
    read_records,
    record_line,
    save_checkpoint,
    save_weights,
    write_text,
    writing,
)
from dgavg.benchmark.tensorboard import EventFiles
from dgavg.chain import renew
from dgavg.data import Splits, TrainingBatches, make_splits
from dgavg.errors import UserError, require
from dgavg.evaluation import Scorer, Split, selected_step
from dgavg.evaluation.scoring import SplitScore
from dgavg.fit import fit
from dgavg.losslog import NonFiniteLossError
from dgavg.run import Run
from dgavg.seeding import seed_everything
from dgavg.trainer import Scores

# What a record names beside the chain: all that its numbers come from.
SETTINGS = ("trainer", "data", "model", "optimizer", "protocol", "stopping", "precision", "device")

Watch = Callable[[Run], None]
THREADS = torch.get_num_threads()  # torch's own choice, from the machine and OMP_NUM_THREADS


def run_fold(
    experiment: Experiment, held_out: str, seed: int, watch: Watch = lambda run: None
) -> list[dict[str, Any]]:
    """Train with `held_out` left out, or go on where a killed run stopped; returns the records.

    A run that is done is only read. Raises `UserError` where its folder holds a run of other
    settings, or another process is at work in it; what can't be trained leaves no folder.
    """
    folder = experiment.run_folder(held_out, seed)
    settings = {**experiment.identity, "held_out": held_out, "seed": seed}
    _check_same(folder, settings)
    if not (folder / "done").exists():
        threads = torch.get_num_threads()
        try:
            fold = _Fold(experiment, held_out, seed, folder, settings)
            with _locked(folder):
                _check_same(folder, settings)  # again: nobody else can write it now
                if not (folder / "config.yaml").exists():
                    write_text(folder / "config.yaml", OmegaConf.to_yaml(settings))
                fold.train(watch)
        finally:
            torch.set_num_threads(threads)
    return read_records(folder / "records.jsonl")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make the folder and keep other processes out of it."""
    make_folder(folder)
    lock = FileLock(folder / ".lock")
    with writing(folder):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            message = f"another process is training in {folder}; wait for it to end"
            raise UserError(message) from None
    with lock:
        yield


def _check_same(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise `UserError` where the folder's `config.yaml` says other settings, or nothing."""
    path = folder / "config.yaml"
    if not path.exists():
        return
    try:
        theirs = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, ValueError, YAMLError):
        theirs = None
    require(
        isinstance(theirs, dict) and "trainer" in theirs,
        f"{path} is damaged or not of dgavg; delete {folder} to train that run anew",
    )
    found = list(differences(settings, theirs))
    require(
        not found,
        f"{folder} holds a run with other settings ({'; '.join(found[:3])}): choose another "
        "name=..., or delete that folder",
    )


@dataclass
class _Clock:
    """Seconds of training, over all the times a run was started."""

    spent: float = 0.0
    start: float = 0.0

    def __post_init__(self) -> None:
        self.start = time.perf_counter()

    def read(self) -> float:
        return self.spent + time.perf_counter() - self.start


def _threads_for(model: nn.Module) -> int:
    """Threads for a model on a CPU: small matrix products lose more to threads than they gain."""
    convolutional = any(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules())
    return THREADS if convolutional else 1


class _Fold:
    """Builds the run of one fold and writes what it leaves."""

    def __init__(
        self,
        experiment: Experiment,
        held_out: str,
        seed: int,
        folder: Path,
        settings: Mapping[str, Any],
    ) -> None:
        self.experiment, self.held_out, self.seed, self.folder = experiment, held_out, seed, folder
        self.settings = settings
        self.records: list[dict[str, Any]] = []
        self.lines: list[str] = []
        protocol, dataset = experiment.protocol, experiment.dataset
        seed_everything(seed)
        index = dataset.index(held_out)
        splits = make_splits(dataset, protocol["holdout_fraction"], trial_seed=seed)
        self.batches = TrainingBatches(
            dataset,
            splits,
            [i for i in range(len(dataset.domains)) if i != index],
            batch_size=protocol["batch_size"],
            seed=seed,
            device=experiment.device,
            augment=protocol["augment"],
        )
        model: nn.Module = experiment.model(dataset.input_shape, len(dataset.classes))
        torch.set_num_threads(experiment.threads or _threads_for(model))
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
            stopping=experiment.stopping,
            precision=experiment.precision,
            seed=seed,
        )
        self.scorer = Scorer(
            model,
            self._splits(splits, index),
            lambda: self.batches.pooled(experiment.eval_batch_size),
            batch_size=experiment.eval_batch_size,
            forward=lambda twin, images: self.run.forward(images, twin)[1],
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
            where = f"hold out {self.held_out}, seed {self.seed}"
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

    def _splits(self, splits: Splits, index: int) -> dict[str, Split]:
        """What is scored: what the selection rule and the table read, or everything."""
        protocol, every = self.experiment.protocol, self.experiment.evaluate_all
        found = {}
        for i, domain in enumerate(self.experiment.dataset.domains):
            parts = {"in": splits.in_[i], "out": splits.out[i]}
            if not every and i != index:
                del parts["in"]
            if not every and i == index:
                needs_out = protocol["test_split"] == "all" or protocol["selection"] == "oracle"
                parts = parts if needs_out else {"in": parts["in"]}
            for part, keys in parts.items():
                rows = torch.from_numpy(keys)
                found[f"{domain.name}/{part}"] = Split(
                    domain.images[rows].to(self.run.device), domain.labels[rows].to(self.run.device)
                )
        return found

    def _evaluate(self, run: Run) -> Scores:
        """Score, record, keep the weights that selection would pick; return validation alone."""
        candidates = run.candidates()
        scores = self.scorer.score(candidates)
        record = {
            "step": run.t,
            "phase": "after_fit" if run.closed else "fit",
            "epoch": run.t / run.epoch_length,
            "held_out": self.held_out,
            "seed": self.seed,
            "chain": self.experiment.spec,
            **{key: self.settings[key] for key in SETTINGS},
            "lr": run.optimizer.param_groups[0]["lr"],
            "losses": run.losses.read(),
            "candidates": {
                name: {
                    "batchnorm": candidates[name].batchnorm,
                    "splits": {split: asdict(score) for split, score in found.items()},
                }
                for name, found in scores.items()
            },
            "timing": {"seconds": self.clock.read()},
        }
        validation = {name: self._validation(found) for name, found in scores.items()}
        self._check_finite(validation["live"]["loss"])
        self._write(record)
        return validation

    def _check_finite(self, loss: float) -> None:
        """Stop before the checkpoint where the last update blew the weights up."""
        if not math.isfinite(loss):
            raise NonFiniteLossError(
                f"step {self.run.t}: the validation loss of the live weights is {loss}; "
                "try a lower optimizer.lr or a smaller weight"
            )

    def _write(self, record: dict[str, Any]) -> None:
        line = record_line(record)
        self.lines.append(line)
        self.records.append(json.loads(line))
        rule = self.experiment.protocol["selection"]
        for name in record["candidates"]:
            if selected_step(self.records, name, rule) == len(self.records) - 1:
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
