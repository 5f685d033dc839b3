"""Splits of each domain into a larger and a smaller part, drawn exactly as DomainBed draws them."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b, md5
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dgavg.errors import UserError, require, unknown

if TYPE_CHECKING:  # a data set may hold its official splits
    from dgavg.data.domains import DomainDataset

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
    """The parts of every domain, as int64 keys into its images; index i is domain i.

    `out` is the held-out part (validation), `in_` the rest: training data, or what DomainBed tests
    on where the domain is the one held out. Published lists may test on other images than they
    train on: `test`, where given, stands in for `in_` of the domain that is held out.
    """

    out: tuple[Keys, ...]
    in_: tuple[Keys, ...]
    test: tuple[Keys, ...] | None = None

    def fingerprint(self) -> str:
        """A hash of all keys: equal splits, equal text."""
        found = blake2b(digest_size=8)
        for part in (self.out, self.in_, self.test or ()):
            found.update(f"{len(part)}".encode())
            for keys in part:
                found.update(f",{len(keys)}:".encode() + keys.astype("<i8").tobytes())
        return found.hexdigest()


def make_splits(
    dataset: DomainDataset, holdout_fraction: float, trial_seed: int, kind: str = "domainbed"
) -> Splits:
    """The splits of one trial, drawn as DomainBed draws them or as the data set publishes them.

    `domainbed`: `int(n * holdout_fraction)` images of each domain are out. They depend on the
    trial seed, the index of the domain and how many images it has; nothing else. With a fraction of
    0 no image is out. `official`: the lists that the data set came with, the same in every trial.

    Raises `UserError` for an unknown kind, a fraction outside [0, 1) or one that leaves a part of
    a domain empty, and for official splits where the data set has none.
    """
    require(
        0 <= holdout_fraction < 1,
        f"protocol.holdout_fraction={holdout_fraction} must lie between 0 and 1; DomainBed has 0.2",
    )
    if kind == "official":
        return _official(dataset, holdout_fraction)
    if kind != "domainbed":
        raise unknown("protocol.splits", kind, ("domainbed", "official"))
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


def _official(dataset: DomainDataset, holdout_fraction: float) -> Splits:
    if dataset.official is None:
        raise UserError(
            f"data set {dataset.name!r} has no official splits here (data=pacs takes them from "
            "data.lists=FOLDER); write protocol.splits=domainbed"
        )
    require(
        holdout_fraction > 0,
        "protocol.holdout_fraction=0 trains on all images, but official splits hold some out; "
        "write protocol.splits=domainbed, or any other fraction (official splits don't read it)",
    )
    return dataset.official
