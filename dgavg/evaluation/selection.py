"""Which checkpoint of a run counts: selection rules on one candidate's records."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dgavg.errors import require, unknown

RULES = {
    "validation": "best mean accuracy on the validation parts of the training domains",
    "last": "the last evaluation",
    "loo": "best mean accuracy on each other domain, over runs that left that one out, too",
    "oracle": "the last evaluation; what it is compared by is the validation part of the HELD-OUT "
    "domain: uses the test domain",
    "oracle_best": "best accuracy on the validation part of the HELD-OUT domain: uses the test "
    "domain",
}
"""`validation`, `loo` and `oracle` are DomainBed's three (Gulrajani & Lopez-Paz 2021, arXiv
2007.01434); its oracle never stops early, so it compares runs and candidates at their end."""

SCORES_HELD_OUT = ("oracle", "oracle_best")  # the rules that read the held-out validation part

Record = Mapping[str, Any]


def validation_score(
    scores: Mapping[str, Mapping[str, Any]], held_out: str | set[str], metric: str = "accuracy"
) -> float:
    """Mean of a metric over the `out` parts of all domains but the held-out ones; NaN without any.

    What was not finite, which records have as null, makes it NaN.
    """
    out = {held_out} if isinstance(held_out, str) else held_out
    found = [
        math.nan if score[metric] is None else score[metric]
        for split, score in scores.items()
        if split.endswith("/out") and split.removesuffix("/out") not in out
    ]
    return sum(found) / len(found) if found else math.nan


def compared(
    records: Sequence[Record],
    candidate: str,
    rule: str,
    pairs: Mapping[str, Sequence[Record]] | None = None,
) -> dict[int, float]:
    """What `rule` compares: by index in `records`, in their order, the accuracy it goes by.

    A record has `held_out`, `step`, and `candidates[name]["splits"][split]["accuracy"]`. `pairs`,
    for `loo` alone: by the name of each other domain, the records of the run that left it out, too.
    Empty where the candidate was never scored, and for `loo` where a run of two domains or its
    evaluation at a step is not there. `last` gives NaN where there are no validation data.

    Raises `UserError` for an unknown rule, and where what the rule reads was not scored.
    """
    if rule not in RULES:
        raise unknown("selection rule", rule, RULES)
    indices = [i for i, r in enumerate(records) if candidate in r["candidates"]]
    if rule in ("last", "oracle"):
        indices = indices[-1:]
    if rule == "loo":
        found = {i: _left_out_too(records[i], candidate, pairs or {}) for i in indices}
        return {i: score for i, score in found.items() if score is not None}
    read = _held_out_score if rule in SCORES_HELD_OUT else _validation
    found_by = {i: read(records[i], candidate) for i in indices}
    for score in found_by.values() if rule == "validation" else ():
        require(not math.isnan(score), "no validation part of a training domain was scored")
    return found_by


def selected_step(
    records: Sequence[Record],
    candidate: str,
    rule: str,
    pairs: Mapping[str, Sequence[Record]] | None = None,
) -> int | None:
    """The index in `records` that `rule` picks for `candidate`; the first of ties.

    `None` where `compared` finds nothing to pick from. Raises `UserError` as `compared` does.
    """
    found = compared(records, candidate, rule, pairs)
    return max(found, key=lambda i: found[i]) if found else None


def held_out_of(record: Record) -> set[str]:
    """The domains that a record's run left out: one or, for `loo`, two."""
    return {record["held_out"], record.get("held_out_with", record["held_out"])}


def _validation(record: Record, candidate: str) -> float:
    return validation_score(record["candidates"][candidate]["splits"], held_out_of(record))


def _held_out_score(record: Record, candidate: str) -> float:
    splits, split = record["candidates"][candidate]["splits"], f"{record['held_out']}/out"
    require(
        split in splits,
        f"the oracle rule reads {split}, which this run did not score: train with evaluate=all or "
        "protocol.selection=oracle",
    )
    return float(splits[split]["accuracy"])


def _left_out_too(
    record: Record, candidate: str, pairs: Mapping[str, Sequence[Record]]
) -> float | None:
    splits = record["candidates"][candidate]["splits"]
    others = {split.rpartition("/")[0] for split in splits} - {record["held_out"]}
    found = []
    for other in others:
        same = [r for r in pairs.get(other, ()) if r["step"] == record["step"]]
        if len(same) != 1 or candidate not in same[0]["candidates"]:
            return None
        scores = same[0]["candidates"][candidate]["splits"]
        require(
            f"{other}/in" in scores,
            f"the rule loo reads {other}/in at every checkpoint, which this run did not score: "
            "train with evaluate=selection",
        )
        found.append(scores[f"{other}/in"]["accuracy"])
    return math.fsum(found) / len(found) if found else None
