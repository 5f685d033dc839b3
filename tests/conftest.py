"""What every test gets: one thread, an end to links that a test defined, `refuses`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch

import dgavg.trainers  # noqa: F401  (its links are in the registry before it is copied)
from dgavg.errors import UserError
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


@contextmanager
def _refuses(*parts: str) -> Iterator[None]:
    with pytest.raises(UserError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, f"{part!r} is not in: {message}"


@pytest.fixture(scope="session")
def refuses() -> Callable[..., AbstractContextManager[None]]:
    """`with refuses("part", ...)`: a UserError of one line that has every part in it."""
    return _refuses
