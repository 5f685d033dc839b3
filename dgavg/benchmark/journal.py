"""Journal: the records of a run in its folder, and the weights that selection would pick."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dgavg.benchmark.files import record_line, save_weights
from dgavg.disk import make_folder, write_text
from dgavg.evaluation import selected_step
from dgavg.evaluation.scoring import SplitScore
from dgavg.run import Run
from dgavg.trainer import Candidate, Weights

# What a record names beside the chain: all that its numbers come from.
SETTINGS = (
    "trainer",
    "data",
    "model",
    "optimizer",
    "protocol",
    "stopping",
    "precision",
    "scoring",
    "scored",
    "device",
    "processes",
    "init_seed",
    "compile",
    "stack",
    "also_batchnorm",
    "search",
    "changed",
)


@dataclass(frozen=True)
class Moment:
    """Where a run stands when its candidates are evaluated."""

    step: int
    epoch: float
    closed: bool  # after the phase that follows the last step
    lr: float
    losses: Mapping[str, float]
    seconds: float

    @classmethod
    def of(cls, run: Run, losses: Mapping[str, float], seconds: float) -> Moment:
        """Where `run` stands, with the losses since the last time and the seconds it has taken."""
        lr = run.optimizer.param_groups[0]["lr"]
        return cls(run.t, run.t / run.epoch_length, run.closed, lr, losses, seconds)


class Journal:
    """Takes in evaluations and writes them; what a checkpoint restores is `lines`.

    `settings` are those of the run, `spec` its chain by name; `left_out` says which domains.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], spec: str, left_out: Mapping[str, str]
    ) -> None:
        self.folder, self.settings, self.spec, self.left_out = folder, settings, spec, left_out
        self.records: list[dict[str, Any]] = []
        self.lines: list[str] = []
        self._picked: dict[str, tuple[Mapping[str, Tensor], dict[str, str]]] = {}

    @property
    def done(self) -> bool:
        """Whether the run has ended."""
        return (self.folder / "done").exists()

    def restore(self, lines: Iterable[str]) -> None:
        """Go on from the records of a checkpoint."""
        self.lines = list(lines)
        self.records = [json.loads(line) for line in self.lines]

    def picks(self, scores: Mapping[str, Mapping[str, SplitScore]]) -> list[str]:
        """The candidates of which selection would pick these scores over all so far.

        By `last` none, before the run has ended.
        """
        rule = self.settings["protocol"]["selection"]
        if rule == "last":
            return []
        record = {**self.left_out, "candidates": _as_record(scores)}
        last = len(self.records)
        return [k for k in scores if selected_step([*self.records, record], k, rule) == last]

    def add(
        self,
        moment: Moment,
        candidates: Mapping[str, Candidate],
        scores: Mapping[str, Mapping[str, SplitScore]],
        weights: Callable[[str], Weights],
    ) -> None:
        """Take in an evaluation; `weights(name)` gives those that a candidate was scored with."""
        record = {
            "step": moment.step,
            "phase": "after_fit" if moment.closed else "fit",
            "epoch": moment.epoch,
            **self.left_out,
            "seed": self.settings["seed"],
            "chain": self.spec,
            **{key: self.settings[key] for key in SETTINGS if key in self.settings},
            "lr": moment.lr,
            "losses": dict(moment.losses),
            "candidates": {
                name: {"batchnorm": candidates[name].batchnorm, **found}
                for name, found in _as_record(scores).items()
                if not candidates[name].probe
            },
            "timing": {"seconds": moment.seconds},
        }
        self.lines.append(record_line(record))
        self.records.append(json.loads(self.lines[-1]))
        rule = self.settings["protocol"]["selection"]
        for name in record["candidates"]:
            picked = selected_step(self.records, name, rule)
            last = picked in (None, len(self.records) - 1)  # None: other runs decide, by `loo`
            if last and not candidates[name].members:  # averaged predictions are no single weights
                notes = {"chain": self.spec, "candidate": name, "step": str(moment.step)}
                self._picked[name] = weights(name), notes

    def write(self) -> None:
        """Write the weights that were picked since the last time, then the records."""
        make_folder(self.folder / "weights")
        for name, (weights, notes) in self._picked.items():
            save_weights(self.folder / "weights" / f"{name}.safetensors", weights, notes)
        self.forget()
        write_text(self.folder / "records.jsonl", "".join(self.lines))

    def forget(self) -> None:
        """Let go of picked weights that another process has written."""
        self._picked.clear()


def _as_record(scores: Mapping[str, Mapping[str, SplitScore]]) -> dict[str, dict[str, Any]]:
    return {
        name: {"splits": {split: asdict(score) for split, score in found.items()}}
        for name, found in scores.items()
    }
