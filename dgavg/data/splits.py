"""Splits of each domain into a larger and a smaller part, drawn exactly as DomainBed draws them."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import md5

import numpy as np
from numpy.typing import NDArray

from dgavg.data.domains import DomainDataset
from dgavg.errors import require

Keys = NDArray[np.int64]


def seed_hash(*args: object) -> int:
    """A seed in 0..2³¹ - 1 made of any values (DomainBed's `misc.seed_hash`).

    >>> seed_hash(0, 0)
    894182419
    """
    return int(md5(str(args).encode(), usedforsecurity=False).hexdigest(), 16) % 2**31


def split_keys(n: int, n_first: int, seed: int) -> tuple[Keys, Keys]:
    """Shuffle 0..n - 1 and cut: keys (n_first,) and (n - n_first,) (DomainBed's `split_dataset`).

    `seed` is 0..2³² - 1, as `seed_hash` gives it.
    """
    keys = np.arange(n, dtype=np.int64)
    np.random.RandomState(seed).shuffle(keys)
    return keys[:n_first], keys[n_first:]


@dataclass(frozen=True, eq=False)
class Splits:
    """The two parts of every domain, as int64 keys into its images; index i is domain i.

    `out` is the held-out part (validation), `in_` the rest: training data, or what DomainBed tests
    on where the domain is the one held out.
    """

    out: tuple[Keys, ...]
    in_: tuple[Keys, ...]


def make_splits(dataset: DomainDataset, holdout_fraction: float, trial_seed: int) -> Splits:
    """DomainBed's splits of one trial: `int(n * holdout_fraction)` images of each domain are out.

    They depend on the trial seed, the index of the domain and how many images it has; nothing else.
    With a fraction of 0 no image is out.

    Raises `UserError` for a fraction outside [0, 1) or one that leaves a part of a domain empty.
    """
    require(
        0 <= holdout_fraction < 1,
        f"protocol.holdout_fraction={holdout_fraction} must lie between 0 and 1; DomainBed has 0.2",
    )
    pairs = []
    for index, domain in enumerate(dataset.domains):
        n, n_out = len(domain), int(len(domain) * holdout_fraction)
        require(
            0 < n_out < n or holdout_fraction == 0,
            f"holding out {holdout_fraction} of the {n} images of domain {domain.name!r} leaves "
            f"{n_out} for validation and {n - n_out} for training; change protocol.holdout_fraction"
            " or use more images",
        )
        pairs.append(split_keys(n, n_out, seed_hash(trial_seed, index)))
    return Splits(out=tuple(out for out, _ in pairs), in_=tuple(in_ for _, in_ in pairs))
