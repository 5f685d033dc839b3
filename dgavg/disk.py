"""Files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from dgavg.errors import UserError

ELSEWHERE = "choose another runs=FOLDER"


@contextmanager
def writing(path: Path, hint: str = ELSEWHERE) -> Iterator[None]:
    """Turn what the system refuses (no space, no permission, no folder) into a `UserError`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save ends its archive even after a failed write, and then fails in another way
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        why = cause.strerror or str(cause)
        raise UserError(f"{path} cannot be written: {why}; {hint}") from error


def make_folder(path: Path) -> None:
    """Make a folder and those above it.

    Raises `UserError` where that cannot be.
    """
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def write_atomically(
    path: Path, write: Callable[[BinaryIO], object], hint: str = ELSEWHERE
) -> None:
    """Write beside `path`, force it to disk, then rename: a reader sees the old file or the new.

    Raises `UserError` where the system refuses; `path` is as before then.
    """
    beside = path.with_name(path.name + ".part")
    with writing(path, hint):
        try:
            with beside.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))
