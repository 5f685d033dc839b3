"""A trained model, rebuilt from the folder that its run left."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from dgavg.averaging.parameters import check_same
from dgavg.benchmark.files import read_records
from dgavg.benchmark.folder import read_config
from dgavg.benchmark.members import is_combined, weights_file
from dgavg.benchmark.rebuild import untrained
from dgavg.errors import UserError, require, unknown
from dgavg.evaluation.selection import compared, held_out_of, selected_step
from dgavg.models import MODELS, Model
from dgavg.trainer import Weights

WHAT = "a run's folder is runs/NAME/HELD-OUT/SEED"


@dataclass(frozen=True, eq=False)
class Saved:
    """A model with the weights of one candidate, and all that its run says of them.

    `model` is on the CPU, in evaluation mode: images (N, C, H, W) in [0, 1] to logits
    (N, classes). `input_shape` is (C, H, W), `domains` are all of the data set, `config` is what
    the run was trained with (a soup's: what its first run was), `record` what it says of the
    checkpoint at hand.
    """

    folder: Path
    model: Model
    candidate: str
    classes: tuple[str, ...]
    input_shape: tuple[int, int, int]
    domains: tuple[str, ...]
    config: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    record: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Chain, held-out domain and seed, as a person would call it."""
        seed = f", seed {self.record['seed']}" if self.record["seed"] >= 0 else ""
        left_out = " and ".join(d for d in self.domains if d in held_out_of(self.record))
        return f"{self.record['chain']}, hold out {left_out}{seed}"

    @property
    def checkpoint(self) -> str:
        """The run's name, the candidate and its step, as a person would call them."""
        return f"{self.name}: {self.candidate} of step {self.record['step']}"

    @property
    def scores(self) -> Mapping[str, Mapping[str, float]]:
        """Accuracy, loss and number of images by split, such as `sketch/in`."""
        found: Mapping[str, Mapping[str, float]]
        found = self.record["candidates"][self.candidate]["splits"]
        return found

    @property
    def support(self) -> int | None:
        """How many rows a prediction depends on, where it depends on the batch."""
        return getattr(self.model, "support", None)


def load_run(folder: Path | str, candidate: str | None = None) -> Saved:
    """The model that a finished run left, ready to predict.

    `candidate` names the weights; by default those that the protocol's rule picks over all
    candidates and checkpoints, see `best_candidate`. A candidate that averages predictions of
    several weights, such as SWAG's samples, left no file and is not among them.

    Raises `UserError` for a folder that holds no finished run, for a run of a model that is a
    function of the user's own, for an ensemble, an unknown candidate, and for damaged files.
    """
    folder = Path(folder)
    _check_run(folder)
    own, records = read_config(folder), read_records(folder / "records.jsonl")
    config = _member_config(folder, own) if is_combined(own) else own
    require(
        "dataset" in config,
        f"{folder / 'config.yaml'} doesn't name the classes and the input shape: that run is of an "
        "older dgavg; train it again",
    )
    there = [k for k in records[-1]["candidates"] if weights_file(folder, k).exists()]
    rule = own["protocol"]["selection"]
    if candidate is None:
        require(bool(there), f"{folder} holds no weights; {_no_weights(own)}")
        candidate = there[0] if len(there) == 1 else best_candidate(records, there, rule)
    elif candidate not in there:
        raise unknown("weights of candidate", candidate, there, str(folder))
    data = config["dataset"]
    channels, height, width = data["input_shape"]
    shape = (channels, height, width)
    domains = len(data["domains"]) - len(held_out_of(records[-1]))
    model = _build(config, shape, len(data["classes"]), domains)
    weights, step = _weights(weights_file(folder, candidate), model)
    model.load_state_dict(weights)
    return Saved(
        folder=folder,
        model=model.eval(),
        candidate=candidate,
        classes=tuple(map(str, data["classes"])),
        input_shape=shape,
        domains=tuple(map(str, data["domains"])),
        config=config,
        records=records,
        record=_checkpoint(records, candidate, rule, step),
    )


def best_candidate(records: Sequence[Mapping[str, Any]], names: Sequence[str], rule: str) -> str:
    """Of several candidates the one to ship: the best by what the rule goes by; first of ties.

    Raises `UserError` where this run alone has nothing to choose by.
    """
    scores = {name: _score(records, name, rule) for name in names}
    require(
        not any(math.isnan(score) for score in scores.values()),
        f"by the rule {rule!r} this run alone can't say which candidate is best: name one with "
        f"--candidate, of {', '.join(names)}",
    )
    return max(names, key=lambda name: scores[name])


def _score(records: Sequence[Mapping[str, Any]], candidate: str, rule: str) -> float:
    found = compared(records, candidate, rule)
    return max(found.values()) if found else math.nan


def _checkpoint(
    records: Sequence[Mapping[str, Any]], candidate: str, rule: str, step: str | None
) -> Mapping[str, Any]:
    """The record of the checkpoint whose weights were kept: what the rule picks, of that step."""
    index = selected_step(records, candidate, rule if len(records) > 1 else "last")
    if index is None or step not in (None, str(records[index]["step"])):
        same = [r for r in records if str(r["step"]) == step and candidate in r["candidates"]]
        return (same or list(records))[-1]
    return records[index]


def _check_run(folder: Path) -> None:
    require(folder.is_dir(), f"no folder {folder}; {WHAT}")
    if not (folder / "config.yaml").exists():
        below = sorted(path.parent for path in folder.rglob("config.yaml"))
        hint = f"write one of the {len(below)} in it, such as {below[0]}" if below else WHAT
        raise UserError(f"{folder} is no run: {hint}")
    require(
        (folder / "done").exists(),
        f"the run in {folder} has not ended; give its command again and it goes on",
    )


def _member_config(folder: Path, own: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a soup, how its first run was trained: the same data and model as all others.

    Raises `UserError` for an ensemble, and where that run is gone.
    """
    require("ensemble" not in own["trainer"], f"{folder} holds no weights; {_no_weights(own)}")
    run, _, seed = next(iter(own["members"])).rpartition("/")
    place = Path(run) / str(own["held_out"]).replace(os.sep, "_") / seed
    for member in (folder.resolve().parents[2] / place, place):  # by name, or where names are equal
        if (member / "config.yaml").exists():
            return read_config(member)
    raise UserError(
        f"{folder} is a soup of runs that are gone: {place / 'config.yaml'} would say of what model"
    )


def _no_weights(config: Mapping[str, Any]) -> str:
    if "ensemble" in config["trainer"]:
        members = " ".join(sorted(config["members"]))
        return f"it is an ensemble: name its runs to dgavg predict ({members})"
    return "delete it to train that run anew"


def _build(
    config: Mapping[str, Any], shape: tuple[int, int, int], classes: int, domains: int
) -> Model:
    """The model as it was before training; nobody's random numbers move."""
    name = config["model"]["name"]
    require(
        name in MODELS,
        f"the model of this run, {name!r}, is a function or a model of another "
        "package: its settings alone don't rebuild it; build it and load the weights in Python",
    )
    with torch.random.fork_rng(devices=[]):
        return untrained(config, shape, classes, domains)


def _weights(path: Path, model: Model) -> tuple[Weights, str | None]:
    """The tensors in a file, which are the model's to the name and shape, and their step."""
    try:
        found = load_file(path)
        with safe_open(path, "pt") as file:
            notes = json.loads((file.metadata() or {}).get("dgavg", "{}"))
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} is missing or damaged; delete {path.parents[1]} to train that run anew"
        ) from error
    try:
        check_same(model.state_dict(), found)
    except ValueError as error:
        raise UserError(f"{path} does not fit the model of its run: {error}") from None
    return found, notes.get("step")
