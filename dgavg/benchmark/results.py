"""Results: what each candidate of each run reached where a rule selects it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dgavg.errors import require
from dgavg.evaluation.selection import compared, validation_score

SELECTED = "selected"
Records = Sequence[Mapping[str, Any]]  # of one run
Runs = dict[str, list[list[dict[str, Any]]]]  # by name: the records of each fold and seed
Cell = tuple[str, int]  # held-out domain and seed


@dataclass(frozen=True)
class Result:
    """What one candidate of one run reached at its selected step; accuracies in [0, 1].

    `candidate` is `selected` for what the rule picks over all candidates, steps and drawn
    hyper-parameters, and `picked` says which that is. `score` is what the rule went by.
    """

    run: str
    chain: str
    candidate: str
    held_out: str
    seed: int
    step: int
    accuracy: float
    loss: float
    validation: float
    batchnorm: str
    picked: str
    score: float
    hparams_seed: int = 0


@dataclass(frozen=True)
class Cells:
    """The runs of one group: those of each cell by `hparams_seed`, and those of two domains.

    `head` is one of their records, to tell what they have in common.
    """

    head: Mapping[str, Any]
    runs: dict[Cell, dict[int, Records]]
    pairs: dict[tuple[frozenset[str], int, int], Records]

    def pairs_of(self, cell: Cell, hparams_seed: int) -> dict[str, Records]:
        """By the other domain: the runs that left it out beside the domain of the cell."""
        held_out, seed = cell
        return {
            next(iter(both - {held_out})): records
            for (both, s, h), records in self.pairs.items()
            if held_out in both and (s, h) == (seed, hparams_seed)
        }


def test_score(record: Mapping[str, Any], candidate: str) -> tuple[float, float]:
    """Accuracy and loss on the held-out domain: its `in` part, or both where the protocol says."""
    return score_of(record, record["candidates"][candidate]["splits"])


def score_of(record: Mapping[str, Any], splits: Mapping[str, Any]) -> tuple[float, float]:
    """As `test_score`, of other weights with these scores by split; NaN where none is of it."""
    protocol = record["protocol"]
    # the test list of official splits, scored as `in`, holds the whole domain already
    whole = protocol["test_split"] == "all" and protocol.get("splits") != "official"
    parts = ("in", "out") if whole else ("in",)
    names = [f"{record['held_out']}/{part}" for part in parts]
    scores = [splits[name] for name in names if name in splits]
    n = sum(s["n"] for s in scores) or math.nan
    losses = [s["loss"] if s["loss"] is not None else math.inf for s in scores]
    accuracy = sum(s["accuracy"] * s["n"] for s in scores) / n
    return accuracy, sum(x * s["n"] for x, s in zip(losses, scores, strict=True)) / n


def title_of(data: Mapping[str, Any]) -> str:
    """The data set of a record or config as people call it."""
    return str(data.get("title") or data["name"])


def searched(record: Mapping[str, Any]) -> tuple[str, ...]:
    """The settings that a search draws for runs like this one."""
    return tuple(record.get("search", {}).get("settings", ()))


def protocol_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The protocol without what a search draws: runs of one table have the same."""
    drawn = searched(record)
    return {k: v for k, v in record["protocol"].items() if f"protocol.{k}" not in drawn}


def domains_of(record: Mapping[str, Any]) -> tuple[str, ...]:
    """The domains that a record has scores of, in the order of the data set."""
    splits = next(iter(record["candidates"].values()))["splits"]
    return tuple(dict.fromkeys(split.rpartition("/")[0] for split in splits))


def hparams_seed(record: Mapping[str, Any]) -> int:
    """Which draw of the search the run is; 0 is the defaults."""
    return int(record.get("search", {}).get("hparams_seed", 0))


def grouped(runs: Runs) -> dict[str, Cells]:
    """Runs by the name of the first of those that differ in nothing but drawn hyper-parameters."""
    names: dict[str, str] = {}
    found: dict[str, Cells] = {}
    for name, each in runs.items():
        for records in each:
            if not records:
                continue
            head = records[0]
            group = names.setdefault(head.get("search", {}).get("group", f"={name}"), name)
            cells = found.setdefault(group, Cells(head, {}, {}))
            seed, draw = head["seed"], hparams_seed(head)
            if "held_out_with" in head:
                both = frozenset((head["held_out"], head["held_out_with"]))
                cells.pairs[both, seed, draw] = records
            else:
                cells.runs.setdefault((head["held_out"], seed), {})[draw] = records
    return found


def results(run: str, cells: Cells, rule: str) -> Iterator[Result]:
    """One for each candidate and cell, and `selected` where there is more than one to pick from."""
    for cell, by_draw in cells.runs.items():
        each: dict[str, list[Result]] = {}
        for draw, records in sorted(by_draw.items()):
            for candidate in records[-1]["candidates"]:  # the last has them all, in order
                pairs = cells.pairs_of(cell, draw) if rule == "loo" else None
                found = _result(run, records, candidate, rule, pairs)
                if found is not None:
                    each.setdefault(candidate, []).append(found)
        best = {candidate: _best(found) for candidate, found in each.items()}
        yield from best.values()
        if len(best) > 1 and not any(math.isnan(b.score) for b in best.values()):
            top = max(best.values(), key=lambda b: b.score)  # the first of ties
            yield replace(top, candidate=SELECTED)


def _best(found: Iterable[Result]) -> Result:
    """The best draw; of ties the last, as in DomainBed."""
    return max(found, key=lambda r: (r.score, r.hparams_seed))


def _result(
    run: str,
    records: Records,
    candidate: str,
    rule: str,
    pairs: Mapping[str, Records] | None,
) -> Result | None:
    made = "members" in records[0]  # a soup has one record: there is nothing to select
    scores = compared(records, candidate, "last" if made else rule, pairs)
    if not scores:
        return None
    index = max(scores, key=lambda i: scores[i])
    record = records[index]
    found = record["candidates"][candidate]
    accuracy, loss = test_score(record, candidate)
    require(
        not math.isnan(accuracy),
        f"the rule {rule} picks step {record['step']} of {candidate}, where {record['held_out']!r} "
        "was not scored: train with evaluate=selection",
    )
    return Result(
        run=run,
        chain=record["chain"],
        candidate=candidate,
        held_out=record["held_out"],
        seed=record["seed"],
        step=record["step"],
        accuracy=accuracy,
        loss=loss,
        validation=validation_score(found["splits"], record["held_out"]),
        batchnorm=found["batchnorm"],
        picked=candidate,
        score=scores[index],
        hparams_seed=hparams_seed(record),
    )
