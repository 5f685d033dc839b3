"""What every test gets: one thread, and an end to links that a test defined."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import dgavg.trainers  # noqa: F401  (its links are in the registry before it is copied)
from dgavg.trainer import TRAINERS

OURS = dict(TRAINERS)

collect_ignore = ["benchmarks"]  # measurements, run by hand


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _registry_restored(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test sees the links of dgavg, and those that its own module defines."""
    before = dict(TRAINERS)
    for name, link in before.items():
        if name not in OURS and link.__module__ != request.node.obj.__module__:
            del TRAINERS[name]
    yield
    TRAINERS.clear()
    TRAINERS.update(before)
