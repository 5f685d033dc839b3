"""Which parts of which domains a run scores."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dgavg.data import DomainDataset, Splits
from dgavg.data.splits import Keys
from dgavg.data.stream import Images
from dgavg.evaluation import Split
from dgavg.evaluation.selection import SCORES_HELD_OUT


def splits_to_score(
    dataset: DomainDataset,
    splits: Splits,
    held_out: Collection[int],
    protocol: Mapping[str, Any],
    device: torch.device,
    *,
    every: bool = False,
    resident: bool | None = None,
) -> dict[str, Split]:
    """What is scored: what the selection rule and the table read, or everything.

    `held_out` are the indices of the domains left out. `resident` says whether the images are
    copied to the device; None measures what fits.
    """
    found = {}
    for i, name, keys in _parts(dataset, splits, held_out, protocol, every):
        domain, rows = dataset.domains[i], torch.from_numpy(keys)
        images = Images([(domain.images, rows)], device, resident)
        found[name] = Split(images, domain.labels[rows].to(device))
    return found


def rows_to_score(
    dataset: DomainDataset,
    splits: Splits,
    held_out: Collection[int],
    protocol: Mapping[str, Any],
    *,
    every: bool = False,
) -> dict[str, Tensor]:
    """The same splits, as rows (n,) of all images of the data set, domain after domain."""
    starts = [0, *itertools.accumulate(len(domain) for domain in dataset.domains)]
    parts = _parts(dataset, splits, held_out, protocol, every)
    return {name: torch.from_numpy(keys) + starts[i] for i, name, keys in parts}


def _parts(
    dataset: DomainDataset,
    splits: Splits,
    held_out: Collection[int],
    protocol: Mapping[str, Any],
    every: bool,
) -> Iterator[tuple[int, str, Keys]]:
    """Index of the domain, name and keys of each split that is scored."""
    for i, domain in enumerate(dataset.domains):
        parts = {"in": splits.in_[i], "out": splits.out[i]}
        if i in held_out and splits.test is not None:
            parts["in"] = splits.test[i]
        if not every and i not in held_out:
            del parts["in"]
        if not every and i in held_out:
            reads_out = protocol["selection"] in SCORES_HELD_OUT
            needs_out = protocol["test_split"] == "all" or reads_out
            parts = parts if needs_out else {"in": parts["in"]}
        for part, keys in parts.items():
            if len(keys):
                yield i, f"{domain.name}/{part}", keys
