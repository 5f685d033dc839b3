"""What a table calls its runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dgavg.benchmark.results import searched

# said where they are not as usual
OPTIONAL = ("init_seed", "scoring", "scored", "compile", "stack")
PARTS = ("trainer", "model", "optimizer", "stopping", "precision", "device", *OPTIONAL)


def labels(records: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """By run: its chain, and the settings in which it differs from another run.

    `records` has one record of each run. Settings of links count between runs of the same chain,
    all others between any two, but for those that a search draws. Runs that differ in nothing of
    that are called by their name too.
    """
    settings = {
        run: {
            key: value
            for key, value in _leaves({part: record[part] for part in PARTS if part in record})
            if key not in searched(record)
        }
        for run, record in records.items()
    }
    found = {}
    for run, record in records.items():
        others = [o for o in records if o != run]
        same_chain = [o for o in others if records[o]["chain"] == record["chain"]]
        differing = [
            f"{key.removeprefix('trainer.')}={_short(value)}"
            for key, value in settings[run].items()
            for rivals in [same_chain if key.startswith("trainer.") else others]
            for other in [None if key.startswith("trainer.") or key in OPTIONAL else value]
            if any(settings[o].get(key, other) != value for o in rivals)
        ]
        found[run] = " ".join([record["chain"], *differing])
    shared = {label for label in found.values() if list(found.values()).count(label) > 1}
    return {k: f"{label} ({k})" if label in shared else label for k, label in found.items()}


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """The settings in nested dicts by dotted name."""
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _leaves(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
