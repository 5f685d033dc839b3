"""Which checkpoint of a run counts: selection rules on one candidate's records."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dgavg.errors import require, unknown

RULES = {
    "validation": "best mean accuracy on the validation parts of the training domains",
    "last": "the last evaluation",
    "oracle": "best accuracy on the validation part of the HELD-OUT domain: uses the test domain",
}


def validation_score(scores: Mapping[str, Mapping[str, float]], held_out: str) -> float:
    """Mean accuracy over the `out` parts of all domains but the held-out one; NaN without any."""
    found = [
        score["accuracy"]
        for split, score in scores.items()
        if split.endswith("/out") and split != f"{held_out}/out"
    ]
    return sum(found) / len(found) if found else math.nan


def selected_step(records: Sequence[Mapping[str, Any]], candidate: str, rule: str) -> int | None:
    """The index in `records` that `rule` picks for `candidate`; the first of ties.

    A record has `held_out`, and `candidates[name]["splits"][split]["accuracy"]`. `None` where the
    candidate was never scored. DomainBed's oracle looks at the last checkpoint alone, where ours
    takes the best: its accuracies are at least as high. Raises `UserError` for an unknown rule.
    """
    if rule not in RULES:
        raise unknown("selection rule", rule, RULES)
    indices = [i for i, r in enumerate(records) if candidate in r["candidates"]]
    if not indices:
        return None
    if rule == "last":
        return indices[-1]

    def score(i: int) -> float:
        splits, held_out = records[i]["candidates"][candidate]["splits"], records[i]["held_out"]
        if rule == "oracle":
            require(
                f"{held_out}/out" in splits,
                f"the oracle rule reads {held_out}/out, which this run did not score: train with "
                "evaluate=all or protocol.selection=oracle",
            )
            return float(splits[f"{held_out}/out"]["accuracy"])
        found = validation_score(splits, held_out)
        require(not math.isnan(found), "no validation part of a training domain was scored")
        return found

    return max(indices, key=score)
