"""DomainBed's three rules of model selection (arXiv 2007.01434, section 3.3), as its code has them.

Accuracies are in [0, 1]. A group is all records of one trial, data set and algorithm whose
`test_envs` name one domain, the group's own: alone (a run that is tested on it), or with a second
one (a run that has left both out, for the rule that validates on the second).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np

from dgavg.benchmark.domainbed.records import Record

T = TypeVar("T")


class Choice(NamedTuple):
    """What a rule picked of the records of one `hparams_seed`: its score there, and the result."""

    validation: float
    test: float


@dataclass(frozen=True)
class Rule:
    """A rule under DomainBed's name: the records of one `hparams_seed` to what it picks of them."""

    name: str
    choose: Callable[[Sequence[Record], int], Choice | None]


def by_key(items: Iterable[T], key: Callable[[T], Any]) -> dict[Any, list[T]]:
    """Items by their key, keys and items in the order they come."""
    found: dict[Any, list[T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def training_domain_validation(records: Sequence[Record], test_env: int) -> Choice | None:
    """The checkpoint that is best on the `out` parts of the training domains; the first of ties."""
    choices = [
        Choice(
            float(np.mean([r[f"env{i}_out_acc"] for i in range(_count(r)) if i != test_env])),
            r[f"env{test_env}_in_acc"],
        )
        for r in _single(records)
    ]
    return _best(choices)


def leave_one_domain_out(records: Sequence[Record], test_env: int) -> Choice | None:
    """The step at which runs that left a second domain out are best on that one, in the mean.

    A step counts where all of those runs and exactly one run without a second domain have it.
    """
    steps = by_key(records, lambda r: r["step"])
    found = (_at_step(steps[step], test_env) for step in sorted(steps))
    return _best([choice for choice in found if choice is not None])


def _at_step(records: Sequence[Record], test_env: int) -> Choice | None:
    single = _single(records)
    if len(single) != 1:
        return None
    scores = {}
    for record in records:
        others = [e for e in record["args"]["test_envs"] if e != test_env]
        if len(others) == 1:
            scores[others[0]] = record[f"env{others[0]}_in_acc"]
    wanted = [i for i in range(_count(records[0])) if i != test_env]
    if not wanted or any(i not in scores for i in wanted):
        return None
    validation = float(np.sum([scores[i] for i in wanted]) / len(wanted))
    return Choice(validation, single[0][f"env{test_env}_in_acc"])


def oracle(records: Sequence[Record], test_env: int) -> Choice | None:
    """The last checkpoint, whose score is on the `out` part of the test domain itself."""
    single = _single(records)
    if not single:
        return None
    last = sorted(single, key=lambda r: r["step"])[-1]
    return Choice(last[f"env{test_env}_out_acc"], last[f"env{test_env}_in_acc"])


RULES = (
    Rule("training-domain validation set", training_domain_validation),
    Rule("leave-one-domain-out cross-validation", leave_one_domain_out),
    Rule("test-domain validation set (oracle)", oracle),
)


def select(records: Sequence[Record], test_env: int, rule: Rule) -> float | None:
    """The accuracy a group reaches: that of its best `hparams_seed`, the largest of ties.

    `None` where the rule can't judge. So it is where scores are NaN (not measured) and there is a
    choice among several, which DomainBed would make blindly.
    """
    seeds = by_key(records, lambda r: r["args"]["hparams_seed"])
    found = [rule.choose(seeds[seed], test_env) for seed in sorted(seeds)]
    choices = [choice for choice in found if choice is not None]
    if len(choices) > 1 and any(math.isnan(c.validation) for c in choices):
        return None
    return sorted(choices, key=lambda c: c.validation)[-1].test if choices else None


def accuracies(records: Iterable[Record], rule: Rule) -> dict[tuple[str, str, int, int], float]:
    """By data set, algorithm, test domain and trial, in the records' order; no empty cells."""
    groups: dict[tuple[str, str, int, int], list[Record]] = {}
    for record in records:
        args: Mapping[str, Any] = record["args"]
        for env in args["test_envs"]:
            key = (args["dataset"], args["algorithm"], env, args["trial_seed"])
            groups.setdefault(key, []).append(record)
    found = {key: select(group, key[2], rule) for key, group in groups.items()}
    return {key: accuracy for key, accuracy in found.items() if accuracy is not None}


def _single(records: Sequence[Record]) -> list[Record]:
    return [r for r in records if len(r["args"]["test_envs"]) == 1]


def _best(choices: Sequence[Choice]) -> Choice | None:
    return max(choices, key=lambda c: c.validation) if choices else None


def _count(record: Record) -> int:
    """How many domains a record has, as DomainBed counts them."""
    return next(i for i in itertools.count() if f"env{i}_out_acc" not in record)
