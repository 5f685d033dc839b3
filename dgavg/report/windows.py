"""Windows: from which step to which an average collects the weights it is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dgavg.averaging import LossValley
from dgavg.benchmark.results import Records
from dgavg.evaluation.selection import held_out_of, validation_score
from dgavg.schedules import step_of

BY_STEP = ("sma", "ema", "posthocema")
BY_EPOCH = ("swa", "swag", "lawa", "twa")
LATEST = {"lawa": "k", "twa": "samples"}  # these keep so many alone


@dataclass(frozen=True)
class Window:
    """An average takes in the weights after steps `first` to `last`, each `every` steps.

    `memory`: for an exponential mean, about how many of the last steps it remembers.
    """

    first: int
    last: int
    every: int = 1
    memory: float | None = None

    @property
    def steps(self) -> range:
        """The steps after which weights were taken in."""
        return range(self.first, self.last + 1, self.every)


def window(candidate: str, records: Records, index: int) -> Window | None:
    """The window of a candidate as it was scored in `records[index]` of its run.

    `None` for the live weights, before the first weights count, and where records don't tell: what
    ASWA took in, and links of other packages.
    """
    record = records[index]
    link = link_of(candidate, record["trainer"])
    settings = record["trainer"].get(link)
    if link == "swad":
        found = _valley(settings, records, index)
    elif link in (*BY_STEP, *BY_EPOCH, "ma") and settings is not None:
        found = _from_start(link, settings, record)
    else:
        found = None
    return found if found is not None and found.first <= found.last else None


def link_of(candidate: str, trainer: Mapping[str, Any]) -> str:
    """The link that offers a candidate: `swag` of `swag_bma@keep`; empty for the live weights."""
    name = candidate.partition("@")[0]
    return max((link for link in trainer if name.startswith(link)), key=len, default="")


def _from_start(link: str, settings: Mapping[str, Any], record: Mapping[str, Any]) -> Window:
    """Of an average that collects from a start on, up to the step of the record."""
    step, steps = record["step"], record["protocol"]["steps"]
    length = round(step / record["epoch"])
    if link == "ma":
        first = (settings["start"] + 1) * length
    else:
        start = step_of(settings["start"], steps, f"trainer.{link}.start")
        first = max(start, 1) if link in BY_STEP else max(-(-start // length), 1) * length
    every = settings["every"] * (1 if link in BY_STEP else length)
    last = first + (step - first) // every * every
    if link in LATEST:
        first = max(first, last - (settings[LATEST[link]] - 1) * every)
    return Window(first, last, every, _memory(settings) if link == "ema" else None)


def _memory(settings: Mapping[str, Any]) -> float | None:
    """Steps after which the weight of an iterate has fallen to 1/e; None for a schedule."""
    if settings["half_life"] is not None:
        return float(settings["half_life"]) / math.log(2)
    decay = settings["decay"]
    if not isinstance(decay, int | float) or settings["warmup"] not in (None, "bias_correction"):
        return None
    return float(settings["every"] / (1.0 - decay))


def _valley(settings: Mapping[str, Any], records: Records, index: int) -> Window | None:
    """SWAD's, from the validation losses of the live weights as the rule itself reads them.

    The iterates between two evaluations stand as a unit vector: what the average has of it shows
    which of them are in.
    """
    head = records[index]
    start = step_of(settings["start"], head["protocol"]["steps"], "trainer.swad.start")
    closed = head.get("phase") == "after_fit"
    fit = [r for r in records if r.get("phase", "fit") == "fit" and r["step"] >= max(start, 1)]
    seen = [r for r in fit if r["step"] <= head["step"]]
    if not seen:
        return None
    options = {k: settings[k] for k in ("n_converge", "n_tolerance", "tolerance_ratio", "rule")}
    segments = torch.eye(len(seen))
    valley = LossValley({"w": segments[0]}, **options)
    for record, segment in zip(seen, segments, strict=True):
        valley.update({"w": segment})
        if record is not seen[-1] or closed:  # candidates are scored before the loss is judged
            splits = record["candidates"]["live"]["splits"]
            loss = validation_score(splits, held_out_of(record), "loss")
            valley.evaluated({"w": segment}, loss)
    inside = valley.weights()["w"].nonzero().flatten().tolist()
    return Window(*_steps(valley, seen, inside, start), settings["every"])


def _steps(
    valley: LossValley, seen: Sequence[Mapping[str, Any]], inside: list[int], start: int
) -> tuple[int, int]:
    """The first and the last step of the segments that are in."""
    first, last = inside[0], seen[inside[-1]]["step"]
    if getattr(valley.rule, "converged", False):
        return seen[first]["step"], last  # the paper's valley begins with these very weights
    return (seen[first - 1]["step"] + 1 if first else max(start, 1)), last
