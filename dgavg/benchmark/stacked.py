"""Runs of one chain, folds and seeds side by side, trained as one stacked network."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from dgavg.benchmark.environment import note_environment
from dgavg.benchmark.experiment import Experiment, Fold, run_label
from dgavg.benchmark.files import load_checkpoint, save_checkpoint
from dgavg.benchmark.fold import (
    Clock,
    Start,
    Watch,
    candidates_of,
    is_convolutional,
    left_out,
    norm_of,
    scored_by,
    settings_of_run,
    shared_options,
    starting,
    threads_for,
)
from dgavg.benchmark.folder import check_same, locked, require_same, write_config
from dgavg.benchmark.journal import Journal, Moment
from dgavg.benchmark.scored import rows_to_score
from dgavg.chain import renew
from dgavg.data.stacked import Pool, StackedBatches
from dgavg.disk import make_folder, write_text
from dgavg.errors import UserError
from dgavg.evaluation import Scorer
from dgavg.evaluation.replicas import PoolSplit, ReplicaScorer
from dgavg.evaluation.scoring import Found
from dgavg.evaluation.stacked import StackedScorer
from dgavg.fit import fit
from dgavg.losslog import NonFiniteLossError
from dgavg.models.stack import Stack, part
from dgavg.run import Run
from dgavg.stacked import StackedRun
from dgavg.trainer import Scores
from dgavg.trial import try_out

Member = tuple[Fold, int]
PAUSE = 10.0  # seconds between two checkpoints: small runs evaluate many times a second
SLOW = (
    "convolutions are not faster side by side on a CPU: write stack=1, with "
    "-m hydra/launcher=joblib for one process a core"
)


def stacks(experiment: Experiment) -> list[list[Member]]:
    """The runs that are not done, side by side: at most `experiment.stack` in each list.

    Those of one stack that was killed come first, together again. Folds of different numbers of
    domains never share one.
    """
    every = [(fold, seed) for seed in experiment.seeds for fold in experiment.folds]
    open_ = [m for m in every if not (experiment.run_folder(*m) / "done").exists()]
    found = [
        members
        for members in _begun(experiment)
        if set(members) <= set(every) and not set(members).isdisjoint(open_)
    ]
    left = [m for m in open_ if m not in itertools.chain(*found)]
    for width in sorted({len(fold) for fold, _ in left}):
        alike = [m for m in left if len(m[0]) == width]
        found += [alike[i : i + experiment.stack] for i in range(0, len(alike), experiment.stack)]
    return found


def run_stack(
    experiment: Experiment,
    members: Sequence[Member],
    watch: Watch = lambda run: None,
    note: Callable[[str], None] = lambda text: None,
) -> None:
    """Train `members` side by side, or go on where a killed process stopped, to their `done`s.

    What is done already stays as it is. `note` is told where side by side is slow. Raises
    `UserError` as `run_fold` does, and for models that can't be stacked or whose epochs differ in
    length.
    """
    threads = torch.get_num_threads()
    try:
        with ExitStack() as held:
            one = _Stacked(experiment, members)
            for folder, settings in zip(one.folders, one.settings, strict=True):
                check_same(folder, settings)
                held.enter_context(locked(folder))
                check_same(folder, settings)
            if not all((folder / "config.yaml").exists() for folder in one.folders):
                one.checkpoint.unlink(missing_ok=True)  # somebody wants a run of it anew
            left = [m for m, j in zip(members, one.journals, strict=True) if not j.done]
            if left and left != list(members) and not one.checkpoint.exists():
                one = _Stacked(experiment, left)
            if left:
                if len(left) > 1 and _is_slow(one.run):
                    note(SLOW)
                one.train(watch)
            one.checkpoint.unlink(missing_ok=True)
    finally:
        torch.set_num_threads(threads)


class _Stacked:
    """Builds the runs of a stack and writes what they leave."""

    def __init__(self, experiment: Experiment, members: Sequence[Member]) -> None:
        self.experiment, self.members = experiment, list(members)
        self.folders = [experiment.run_folder(*m) for m in members]
        self.settings = [settings_of_run(experiment, *m) for m in members]
        self.labels = [run_label(*member) for member in members]
        self.journals = [
            Journal(folder, settings, experiment.spec, left_out(fold))
            for folder, settings, (fold, _) in zip(
                self.folders, self.settings, members, strict=True
            )
        ]
        self.checkpoint = _folder(experiment) / f"{_digest(self.members)}.pt"
        starts = [starting(experiment, *m, resident=False) for m in members]  # one pool serves all
        self._check_epochs([s.batches.epoch_length for s in starts])
        stack = Stack([s.model for s in starts])
        torch.set_num_threads(experiment.threads or threads_for(stack))
        stack.to(experiment.device).train()
        parts = [s.batches for s in starts]
        self.domains = [part.names for part in parts]
        batches = StackedBatches(experiment.dataset, parts, self.labels, experiment.device)
        self.run = StackedRun(
            renew(experiment.trainer),
            stack,
            batches,
            **shared_options(experiment),
            evaluate=self._evaluate,
        )
        try_out(self.run, [s.model for s in starts], experiment.dataset.input_shape)
        self.scorer = self._scorer(starts, stack, batches.pool)
        self.clock, self.saved = Clock(), time.perf_counter()

    def _scorer(
        self, starts: Sequence[Start], stack: Stack, pool: Pool
    ) -> StackedScorer | ReplicaScorer:
        experiment, size = self.experiment, self.experiment.eval_batch_size
        every = experiment.evaluate == "all"
        splits = [
            rows_to_score(
                experiment.dataset, s.splits, s.held_out, experiment.protocol, every=every
            )
            for s in starts
        ]
        pooled = [[s.batches.places[k.cpu()] for k in s.batches.pooled_rows(size)] for s in starts]
        forward = scored_by(experiment)
        if stack.layered:
            return StackedScorer(
                stack, splits, pooled, pool.images, pool.labels, batch_size=size, forward=forward
            )
        stack.lend([s.model for s in starts])
        return ReplicaScorer(
            [
                Scorer(
                    start.model,
                    {name: PoolSplit(pool, rows) for name, rows in own.items()},
                    lambda batches=batches: map(pool.images, batches),  # type: ignore[misc]
                    batch_size=size,
                    forward=forward,
                )
                for start, own, batches in zip(starts, splits, pooled, strict=True)
            ]
        )

    def _check_epochs(self, lengths: Sequence[int]) -> None:
        if len(set(lengths)) > 1:
            raise UserError(
                f"stack={self.experiment.stack}: epochs have {min(lengths)} to {max(lengths)} "
                "steps in different folds: write stack=1"
            )

    def train(self, watch: Watch) -> None:
        """Train to the end; then, and only then, write what says that each run is done."""
        for journal in self._open():
            write_config(journal.folder, journal.settings)
        if self.checkpoint.exists():
            self._resume()
        for journal in self._open():
            journal.write()
            note_environment(journal.folder, self.run.device)
        try:
            fit(self.run, after_step=watch, after_eval=lambda run: self._save_now_and_then())
        except NonFiniteLossError:
            self.checkpoint.unlink(missing_ok=True)  # the others are trained without that one
            raise
        self._save()  # a process killed while it writes the rest has nothing to train again
        for journal in self._open():
            write_text(journal.folder / "done", "done")

    def _open(self) -> list[Journal]:
        """Of the runs that are not done."""
        return [journal for journal in self.journals if not journal.done]

    def _resume(self) -> None:
        saved = load_checkpoint(self.checkpoint)
        for mine, theirs in zip(self.settings, saved["settings"], strict=True):
            advice = "; delete it to start these runs anew"
            require_same(mine, theirs, f"{self.checkpoint} is of a run", advice)
        torch.set_num_threads(saved["threads"])
        self.run.load_state_dict(saved["run"])
        for journal, lines in zip(self.journals, saved["records"], strict=True):
            journal.restore(lines)
        self.clock = Clock(spent=saved["seconds"])

    def _save_now_and_then(self) -> None:
        if time.perf_counter() - self.saved >= PAUSE:
            self._save()

    def _save(self) -> None:
        for journal in self._open():
            journal.write()
        make_folder(self.checkpoint.parent)
        content = {
            "settings": self.settings,
            "members": [[list(fold), seed] for fold, seed in self.members],
            "run": self.run.state_dict(),
            "records": [journal.lines for journal in self.journals],
            "seconds": self.clock.read(),
            "threads": torch.get_num_threads(),
        }
        save_checkpoint(self.checkpoint, content)
        self.saved = time.perf_counter()

    def _evaluate(self, run: Run) -> Scores:
        """Score and note; no link of a stack decides by scores, so none are given back."""
        candidates = candidates_of(run, self.experiment)
        scores = self.scorer.score(candidates)
        for r, found in enumerate(scores):
            self._check_finite(r, found)
        if not candidates:  # those asked for begin later
            return {}
        for r, (journal, losses) in enumerate(zip(self.journals, self._losses(), strict=True)):
            moment = Moment.of(run, losses, self.clock.read())
            journal.add(moment, candidates, scores[r], lambda k, r=r: self.scorer.weights(k, r))  # type: ignore[misc]
        return {}

    def _losses(self) -> Iterator[dict[str, float]]:
        """Of each run, what its own loss log would say."""
        means = self.run.losses.read()
        names = self.run.names
        each = len(names) // len(self.members)
        for r in range(len(self.members)):
            mine = zip(self.domains[r], names[r * each : (r + 1) * each], strict=True)
            risks = {f"risk/{domain}": means[f"risk/{k}"] for domain, k in mine}
            start = f"term/{r}/"
            terms = {k: v for k, v in means.items() if k.startswith(start)}
            total = math.fsum(risks.values()) / each + math.fsum(terms.values())
            named = {f"term/{k.removeprefix(start)}": v for k, v in terms.items()}
            yield {"total": total, **risks, **named}

    def _check_finite(self, r: int, scores: Mapping[str, Found]) -> None:
        """By validation data alone: what the held-out domain gives decides nothing."""
        what, mine = "validation loss", self.domains[r]
        live = scores.get("live", {})
        found = [score.loss for k, score in live.items() if k.rpartition("/")[0] in mine]
        if not found:  # no validation data, or other candidates alone
            what, found = "norm", [norm_of(part(self.run.live, r))]
        if not all(map(math.isfinite, found)):
            raise NonFiniteLossError(
                f"step {self.run.t}: the {what} of the live weights is not finite "
                f"({self.labels[r]}); try a lower optimizer.lr or a smaller weight"
            )


def _is_slow(run: Run) -> bool:
    return run.device.type == "cpu" and is_convolutional(run.model)


def _folder(experiment: Experiment) -> Path:
    return experiment.folder / ".stacks"


def _digest(members: Sequence[Member]) -> str:
    return hashlib.sha256(json.dumps(members).encode()).hexdigest()[:8]


def _begun(experiment: Experiment) -> Iterator[list[Member]]:
    """The members of stacks that were killed, unless the folder of one has been deleted since."""
    for path in sorted(_folder(experiment).glob("*.pt")):
        try:
            saved = load_checkpoint(path)
        except UserError:
            if path.exists():  # else another process has just come to its end
                raise
            continue
        members = [(tuple(fold), seed) for fold, seed in saved["members"]]
        if all((experiment.run_folder(*m) / "config.yaml").exists() for m in members):
            yield members
