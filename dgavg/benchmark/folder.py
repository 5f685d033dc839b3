"""The folder of a run: who is at work in it, and what its `config.yaml` says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from omegaconf._utils import get_omega_conf_dumper

from dgavg.benchmark.files import differences
from dgavg.disk import make_folder, write_text, writing
from dgavg.distributed import on_first
from dgavg.errors import UserError, require
from dgavg.seeding import check_processes


class BusyError(UserError):
    """Another process is at work in the folder of a run."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder and keep other processes out of it.

    Raises `BusyError` where another one is at work there.
    """
    lock = FileLock(folder / ".lock")

    def take() -> None:
        make_folder(folder)
        with writing(folder):
            try:
                lock.acquire(timeout=0)
            except Timeout:
                message = f"another process is training in {folder}; wait for it to end"
                raise BusyError(message) from None

    on_first(take)
    try:
        yield
    finally:
        lock.release()


def is_free(folder: Path) -> bool:
    """Whether no process is at work in the folder of a run."""
    try:
        with locked(folder):
            return True
    except BusyError:
        return False


def check_same(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise `UserError` where the folder's `config.yaml` says other settings, or nothing."""
    if not (folder / "config.yaml").exists():
        return
    theirs = read_config(folder)
    check_processes(str(folder), theirs.get("processes", 1))
    advice = ": choose another name=..., or delete that folder"
    require_same(settings, theirs, f"{folder} holds a run", advice)


def require_same(mine: Any, theirs: Any, what: str, advice: str) -> None:
    """Raise `UserError`, with the first differences, where settings are not the same."""
    found = list(differences(mine, theirs))
    require(not found, f"{what} with other settings ({'; '.join(found[:3])}){advice}")


def write_config(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the `config.yaml` of a run, if it has none."""
    if not (folder / "config.yaml").exists():
        write_text(folder / "config.yaml", as_yaml(settings))


def as_yaml(settings: Mapping[str, Any]) -> str:
    """What `OmegaConf.to_yaml` writes of plain settings, without making a config of them first."""
    dumper = get_omega_conf_dumper()  # of strings that would be read as numbers
    found: str = yaml.dump(
        dict(settings),
        Dumper=dumper,
        default_flow_style=False,
        allow_unicode=True,
        sort_keys=False,
    )
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.yaml` of a run.

    Raises `UserError` where it is damaged.
    """
    path = folder / "config.yaml"
    found: Any = None
    with suppress(OSError, ValueError, yaml.YAMLError):
        found = OmegaConf.to_container(OmegaConf.load(path))
    if not isinstance(found, dict) or "trainer" not in found:
        raise UserError(
            f"{path} is damaged or not of dgavg; delete {folder} to train that run anew"
        )
    return found
