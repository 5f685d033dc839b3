"""Which parts of which domains a run scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dgavg.data import DomainDataset, Splits
from dgavg.evaluation import Split


def splits_to_score(
    dataset: DomainDataset,
    splits: Splits,
    held_out: int,
    protocol: Mapping[str, Any],
    device: torch.device,
    *,
    every: bool = False,
) -> dict[str, Split]:
    """What is scored: what the selection rule and the table read, or everything."""
    found = {}
    for i, domain in enumerate(dataset.domains):
        parts = {"in": splits.in_[i], "out": splits.out[i]}
        if not every and i != held_out:
            del parts["in"]
        if not every and i == held_out:
            needs_out = protocol["test_split"] == "all" or protocol["selection"] == "oracle"
            parts = parts if needs_out else {"in": parts["in"]}
        for part, keys in parts.items():
            if not len(keys):
                continue
            rows = torch.from_numpy(keys)
            found[f"{domain.name}/{part}"] = Split(
                domain.images[rows].to(device), domain.labels[rows].to(device)
            )
    return found
