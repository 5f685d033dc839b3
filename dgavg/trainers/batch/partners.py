"""What links that mix rows of a batch have in common: who is mixed with whom, and the labels."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dgavg.batch import Batch
from dgavg.errors import require


def check_across(name: str, across: bool, domains: int) -> None:
    """Raise `UserError` where rows shall be mixed across domains and there is one."""
    require(
        not across or domains > 1,
        f"{name!r} mixes across domains, and here is one: write trainer.{name}.across=false to mix "
        "within it",
    )


def next_in_cycle(random: np.random.Generator, domains: int) -> np.ndarray:
    """For each domain the next one in a random cycle of all; shape (domains,)."""
    cycle = random.permutation(domains)
    partner = np.empty(domains, dtype=np.int64)
    partner[cycle] = np.roll(cycle, -1)
    return partner


def partners(
    random: np.random.Generator, n: int, domains: int, *, across: bool, shuffled: bool
) -> Tensor:
    """The row that each of `n` rows, ordered by domain, is mixed with; shape (n,), on the CPU.

    Across domains it is a row of the next domain in a random cycle, else one of the same domain:
    the row at the same place, or in random order if `shuffled`.
    """
    rows = n // domains
    first = next_in_cycle(random, domains) if across else np.arange(domains)
    places = np.tile(np.arange(rows), (domains, 1))
    if shuffled:
        places = random.permuted(places, axis=1)
    return torch.from_numpy((first[:, None] * rows + places).reshape(-1))


def partners_of(random: np.random.Generator, batch: Batch, across: bool) -> Tensor:
    """The partners of a batch's rows, on its device: across domains at the same place."""
    found = partners(random, len(batch.y), batch.domains, across=across, shuffled=not across)
    return found.to(batch.x.device, non_blocking=True)


def probabilities(batch: Batch, classes: int) -> Tensor:
    """The labels as probabilities (N, classes)."""
    if batch.y.is_floating_point():
        return batch.y
    return F.one_hot(batch.y, classes).to(batch.x.dtype)


def every_row(by_domain: Tensor, batch: Batch, dims: int) -> Tensor:
    """A number of each domain (domains,) as one of each row, to multiply (N, ...) of `dims` axes.

    On the batch's device.
    """
    rows = len(batch.y) // batch.domains
    there = by_domain.to(batch.x.device, non_blocking=True)
    return there.repeat_interleave(rows).view(-1, *[1] * (dims - 1))
