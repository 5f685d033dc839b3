"""One run: a fold and a seed, from its folder or from the start, to its `done`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from torch import nn

from dgavg.benchmark.experiment import Experiment, tensorboard_writer
from dgavg.benchmark.files import (
    append_line,
    differences,
    load_checkpoint,
    read_records,
    record_line,
    save_checkpoint,
    save_weights,
    write_text,
)
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

Watch = Callable[[Run], None]
THREADS = torch.get_num_threads()  # torch's own choice, from the machine and OMP_NUM_THREADS


def run_fold(
    experiment: Experiment, held_out: str, seed: int, watch: Watch = lambda run: None
) -> list[dict[str, Any]]:
    """Train with `held_out` left out, or go on where a killed run stopped; returns the records.

    A run that is done is only read. Raises `UserError` where its folder holds a run of other
    settings, or another process is at work in it.
    """
    folder = experiment.run_folder(held_out, seed)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another process is training in {folder}; wait for it to end") from None
    with lock:
        _claim(folder, experiment, held_out, seed)
        if not (folder / "done").exists():
            _Fold(experiment, held_out, seed, folder).train(watch)
        return read_records(folder / "records.jsonl")


def _claim(folder: Path, experiment: Experiment, held_out: str, seed: int) -> None:
    """Write `config.yaml`, or make sure that the one there says the same."""
    mine = {**experiment.identity, "held_out": held_out, "seed": seed}
    path = folder / "config.yaml"
    if path.exists():
        theirs = OmegaConf.to_container(OmegaConf.load(path))
        found = list(differences(mine, theirs))
        require(
            not found,
            f"{folder} holds a run with other settings ({'; '.join(found[:3])}): choose another "
            "name=..., or delete that folder",
        )
    else:
        write_text(path, OmegaConf.to_yaml(OmegaConf.create(mine)))


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

    def __init__(self, experiment: Experiment, held_out: str, seed: int, folder: Path) -> None:
        self.experiment, self.held_out, self.seed, self.folder = experiment, held_out, seed, folder
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
            autocast=self.run.autocast,
        )
        self.clock = _Clock()
        self.logger: Any = None

    def train(self, watch: Watch) -> None:
        """Train to the end; then, and only then, write `done`."""
        (self.folder / "weights").mkdir(exist_ok=True)
        checkpoint = self.folder / "checkpoint.pt"
        if checkpoint.exists():
            self._resume(load_checkpoint(checkpoint))
        write_text(self.folder / "records.jsonl", "".join(self.lines))
        if self.experiment.tensorboard:
            self.logger = tensorboard_writer(self.folder / "tensorboard", self.run.t)
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
            if self.logger is not None:
                self.logger.close()
        write_text(self.folder / "done", "done")

    def _resume(self, saved: dict[str, Any]) -> None:
        self.run.load_state_dict(saved["run"])
        self.lines = list(saved["records"])
        self.records = [json.loads(line) for line in self.lines]
        self.clock = _Clock(spent=saved["seconds"])

    def _save(self) -> None:
        save_checkpoint(
            self.folder / "checkpoint.pt",
            {"run": self.run.state_dict(), "records": self.lines, "seconds": self.clock.read()},
        )

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
            "trainer": self.experiment.identity["trainer"],
            "data": self.experiment.identity["data"],
            "protocol": self.experiment.protocol,
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
        self._write(record)
        return {name: self._validation(found) for name, found in scores.items()}

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
        append_line(self.folder / "records.jsonl", line)
        if self.logger is not None:
            self._log(record)

    def _log(self, record: dict[str, Any]) -> None:
        for name, value in record["losses"].items():
            self.logger.add_scalar(f"loss/{name}", value, record["step"])
        for name, found in record["candidates"].items():
            for split, score in found["splits"].items():
                self.logger.add_scalar(f"{name}/{split}", score["accuracy"], record["step"])

    def _validation(self, found: dict[str, SplitScore]) -> dict[str, float]:
        """Means over the validation parts of the training domains: all that training may see."""
        mine = [v for k, v in found.items() if k in {f"{n}/out" for n in self.batches.names}]
        return {
            "accuracy": sum(s.accuracy for s in mine) / len(mine),
            "loss": sum(s.loss for s in mine) / len(mine),
        }
