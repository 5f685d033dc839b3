"""What every test gets: one thread, and an end to links that a test defined."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import dgavg.trainers  # noqa: F401  (its links are in the registry before any test copies it)
from dgavg.trainer import TRAINERS

collect_ignore = ["benchmarks"]  # measurements, run by hand


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _registry_restored() -> Iterator[None]:
    before = dict(TRAINERS)
    yield
    TRAINERS.clear()
    TRAINERS.update(before)
