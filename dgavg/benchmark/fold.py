"""One run: a fold and a seed, from its folder or from the start, to its `done`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgavg.benchmark.environment import note_environment
from dgavg.benchmark.experiment import Experiment, Fold, run_label
from dgavg.benchmark.files import (
    load_checkpoint,
    read_records,
    save_checkpoint,
)
from dgavg.benchmark.folder import check_same, locked, require_same, write_config
from dgavg.benchmark.journal import Journal, Moment
from dgavg.benchmark.scored import splits_to_score
from dgavg.benchmark.tensorboard import EventFiles
from dgavg.chain import adapt, renew
from dgavg.data import DomainDataset, Splits, TrainingBatches, make_splits
from dgavg.disk import write_text
from dgavg.distributed import on_first
from dgavg.evaluation import Scorer
from dgavg.evaluation.scoring import SplitScore
from dgavg.fit import fit
from dgavg.gather import mean
from dgavg.losslog import NonFiniteLossError
from dgavg.models import Model
from dgavg.models.model import lay_out
from dgavg.run import Run, autocast
from dgavg.seeding import random_state, seed_everything, seed_own, set_random_state
from dgavg.trainer import Candidate, Scores, Weights

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
    settings = settings_of_run(experiment, fold, seed)

    def done() -> bool:
        check_same(folder, settings)
        return (folder / "done").exists()

    def begin() -> None:
        check_same(folder, settings)  # again: nobody else can write it now
        write_config(folder, settings)

    if not on_first(done):
        threads = torch.get_num_threads()
        try:
            one = _Fold(experiment, fold, seed, folder, settings)
            with locked(folder):
                on_first(begin)
                one.train(watch)
        finally:
            torch.set_num_threads(threads)
    return on_first(lambda: read_records(folder / "records.jsonl"))


def settings_of_run(experiment: Experiment, fold: Fold, seed: int) -> dict[str, Any]:
    """What `config.yaml` says of a run."""
    shared = {**experiment.identity, "dataset": described(experiment.dataset)}
    return shared | left_out(fold) | {"seed": seed}


def left_out(fold: Fold) -> dict[str, str]:
    """What settings and records say of a fold."""
    return dict(zip(("held_out", "held_out_with"), fold, strict=False))


def described(dataset: DomainDataset) -> dict[str, Any]:
    """What whoever uses the weights of a run must know of the data they were trained on."""
    return {
        "domains": list(dataset.names),
        "classes": list(dataset.classes),
        "input_shape": list(dataset.input_shape),
    }


@dataclass
class Clock:
    """Seconds of training, over all the times a run was started."""

    spent: float = 0.0
    start: float = 0.0

    def __post_init__(self) -> None:
        self.start = time.perf_counter()

    def read(self) -> float:
        return self.spent + time.perf_counter() - self.start


def threads_for(model: nn.Module) -> int:
    """Threads for a model on a CPU: small matrix products lose more to threads than they gain."""
    return THREADS if is_convolutional(model) else 1


def is_convolutional(model: nn.Module) -> bool:
    """Whether there is a convolution in it."""
    return any(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules())


def _initial_model(experiment: Experiment, domains: int) -> Model:
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


def shared_options(experiment: Experiment) -> dict[str, Any]:
    """What every run of an experiment is given, also one in a stack."""
    protocol = experiment.protocol
    return {
        **{key: protocol[key] for key in ("steps", "eval_every", "first_eval")},
        "optimizer": experiment.optimizer,
        "schedule": experiment.schedule,
        "precision": experiment.precision,
    }


def scored_by(experiment: Experiment) -> Callable[[nn.Module, Tensor], Tensor]:
    """Logits of a model, in the precision of scoring."""

    def forward(model: Any, images: Tensor) -> Tensor:
        with autocast(experiment.scoring, experiment.device):
            logits: Tensor = model.classifier(model.featurizer(images))
        return logits.float()

    return forward


def candidates_of(run: Run, experiment: Experiment) -> dict[str, Candidate]:
    """What is scored, each average followed by itself under the other batch-norm policies."""
    found = {}
    wanted = experiment.deciding if scores_last(experiment, run) else experiment.candidates
    for name, candidate in run.candidates().items():
        if candidate.probe or wanted is None or name in wanted:
            found[name] = candidate
            alone = candidate.probe or name == "live"
            for policy in () if alone else experiment.also_batchnorm:
                if policy != candidate.batchnorm:
                    found[f"{name}@{policy}"] = replace(candidate, batchnorm=policy)
    return found


def scores_last(experiment: Experiment, run: Run) -> bool:
    """Whether the rule reads nothing of what stands now, but only what a run ends with."""
    last = experiment.evaluate == "picked" and experiment.protocol["selection"] == "last"
    ended = run.t == run.steps and (run.closed or not run.taps["after_fit"])
    return last and not ended


def norm_of(weights: Weights) -> float:
    """The norm of all that are floating-point numbers; not finite where one of them is not."""
    return nn.utils.get_total_norm(t for t in weights.values() if t.is_floating_point()).item()


@dataclass(frozen=True)
class Start:
    """What the run of a fold and a seed starts from."""

    held_out: tuple[int, ...]
    splits: Splits
    batches: TrainingBatches
    model: Model


def starting(
    experiment: Experiment, fold: Fold, seed: int, *, resident: bool | None = None
) -> Start:
    """Seed everything, then make splits, batches and the model, on a CPU.

    `resident` as for `TrainingBatches`.
    """
    protocol, dataset = experiment.protocol, experiment.dataset
    seed_everything(seed)
    held_out = tuple(dataset.index(name) for name in fold)
    splits = make_splits(
        dataset, protocol["holdout_fraction"], trial_seed=seed, kind=protocol["splits"]
    )
    batches = TrainingBatches(
        dataset,
        splits,
        [i for i in range(len(dataset.domains)) if i not in held_out],
        batch_size=protocol["batch_size"],
        seed=seed,
        device=experiment.device,
        augment=protocol["augment"],
        resident=resident,
    )
    model = _initial_model(experiment, len(dataset.domains) - len(fold))
    return Start(held_out, splits, batches, model)


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
        self.journal = Journal(folder, settings, experiment.spec, left_out(fold))
        protocol = experiment.protocol
        start = starting(experiment, fold, seed)
        self.batches, model = start.batches, start.model
        torch.set_num_threads(experiment.threads or threads_for(model))
        model.to(experiment.device)
        lay_out(model)
        model.train()
        self.run = Run(
            renew(experiment.trainer),
            model,
            self.batches,
            **shared_options(experiment),
            evaluate=self._evaluate,
            stopping=experiment.stopping,
            compile=experiment.compile,
            clip=experiment.clip,
            seed=seed,
        )
        seed_own(seed)
        self.scorer = Scorer(
            model,
            splits_to_score(
                experiment.dataset,
                start.splits,
                start.held_out,
                protocol,
                self.run.device,
                every=experiment.evaluate == "all",
            ),
            lambda: self.batches.pooled(experiment.eval_batch_size),
            batch_size=experiment.eval_batch_size,
            forward=scored_by(experiment),
            held_out=frozenset(f"{name}/{part}" for name in fold for part in ("in", "out")),
        )
        self.clock = Clock()
        self.events: EventFiles | None = None

    def train(self, watch: Watch) -> None:
        """Train to the end; then, and only then, write `done`."""
        checkpoint = self.folder / "checkpoint.pt"
        if on_first(checkpoint.exists):
            self._resume(checkpoint)
        on_first(self._begin)
        try:
            fit(self.run, after_step=watch, after_eval=lambda run: self._save())
        except NonFiniteLossError as error:
            good = (
                f"the last good checkpoint, of step {records[-1]['step']}, is {checkpoint}"
                if (records := self.journal.records)
                else "no checkpoint had been written yet"
            )
            where = run_label(self.fold, self.seed)
            raise NonFiniteLossError(f"{error} ({where}; {good})") from None
        finally:
            if self.events is not None:
                self.events.close()
        on_first(lambda: write_text(self.folder / "done", "done"))

    def _begin(self) -> None:
        self.journal.write()
        note_environment(self.folder, self.run.device)
        if self.experiment.tensorboard:
            self.events = EventFiles(self.folder / "tensorboard", self.journal.records)

    def _write(self) -> None:
        self.journal.write()
        if self.events is not None:
            self.events.write(self.journal.records[-1])

    def _resume(self, checkpoint: Path) -> None:
        saved = on_first(lambda: load_checkpoint(checkpoint))
        advice = "; delete it to start this run anew"
        require_same(self.settings, saved["settings"], f"{checkpoint} is of a run", advice)
        torch.set_num_threads(saved["threads"])  # sums depend on how they are split
        self.run.load_state_dict(saved["run"])
        self.journal.restore(saved["records"])
        self.clock = Clock(spent=saved["seconds"])

    def _save(self) -> None:
        content = {
            "settings": self.settings,
            "run": self.run.state_dict(),
            "records": self.journal.lines,
            "seconds": self.clock.read(),
            "threads": torch.get_num_threads(),
        }
        on_first(lambda: save_checkpoint(self.folder / "checkpoint.pt", content))

    def _evaluate(self, run: Run) -> Scores:
        """Score, record, keep the weights that selection would pick; return validation alone."""
        candidates = candidates_of(run, self.experiment)
        if not candidates:  # those asked for begin later
            self._check_finite((), {})
            return {}
        # of what is not picked nobody reads how it did on the held-out domain
        sparing = self.experiment.evaluate == "picked" and run.t < run.steps
        sparing |= scores_last(self.experiment, run)
        tested = self.journal.picks if sparing else None
        # what `after_fit` leaves as it is need not be scored twice
        again = run.t == run.steps and bool(run.taps["after_fit"]) and not (run.closed or sparing)
        scores = self.scorer.score(candidates, keep=again, tested=tested)
        moment = Moment.of(run, run.losses.read(), self.clock.read())
        validation = {}
        if self.experiment.protocol["holdout_fraction"]:
            validation = {name: self._validation(found) for name, found in scores.items()}
        self._check_finite(scores, validation)
        self.journal.add(moment, candidates, scores, self.scorer.weights)
        on_first(self._write)
        self.journal.forget()
        return validation

    @torch.no_grad()
    def _training_loss(self) -> float:
        """Of the live weights, on one batch."""
        batch = self.run.batches(self.run.t)
        logits = self.scorer.logits("live", batch.x)
        return mean(F.cross_entropy(logits, batch.y)).item()

    def _check_finite(
        self, scores: Collection[str], validation: Mapping[str, Mapping[str, float]]
    ) -> None:
        """Stop before the checkpoint where the last update blew the weights up."""
        if "live" in validation:
            what, found = "validation loss", validation["live"]["loss"]
        elif "live" in scores:
            what, found = "training loss", self._training_loss()
        else:
            what, found = "norm", norm_of(self.run.live)
        if not math.isfinite(found):
            raise NonFiniteLossError(
                f"step {self.run.t}: the {what} of the live weights is {found}; "
                "try a lower optimizer.lr or a smaller weight"
            )

    def _validation(self, found: dict[str, SplitScore]) -> dict[str, float]:
        """Means over the validation parts of the training domains: all that training may see."""
        mine = [v for k, v in found.items() if k in {f"{n}/out" for n in self.batches.names}]
        return {
            "accuracy": sum(s.accuracy for s in mine) / len(mine),
            "loss": sum(s.loss for s in mine) / len(mine),
        }
