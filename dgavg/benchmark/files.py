"""Files that are whole or not there: atomic writes, checkpoints, records."""

from __future__ import annotations

import json
import math
import os
import pickle
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import BadZipFile

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from dgavg.errors import UserError

FORMAT = "dgavg checkpoint 1"


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write beside `path`, force it to disk, then rename: a reader sees the old file or the new."""
    beside = path.with_name(path.name + ".part")
    with beside.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint of tensors, numbers, strings, lists and dicts."""
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **content}, file))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, without running any code in it.

    Raises `UserError` for a file that is truncated or not a checkpoint of dgavg.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        ours = isinstance(content, dict) and content.get("format") == FORMAT
    except (
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        BadZipFile,
        pickle.UnpicklingError,
    ):
        ours = False
    if not ours:
        raise UserError(
            f"{path} is truncated or not a checkpoint of dgavg; delete it to start this run anew"
        )
    return dict(content)


def save_weights(path: Path, weights: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
    """Write weights by name as safetensors; `notes` become the file's metadata."""
    tensors = {k: v.detach().cpu().clone().contiguous() for k, v in weights.items()}
    data = safetensors_bytes(tensors, metadata=dict(notes))
    write_atomically(path, lambda file: file.write(data))


def record_line(record: Mapping[str, Any]) -> str:
    """A record as one line of JSON; what is not finite becomes null."""

    def finite(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, Mapping):
            return {str(k): finite(v) for k, v in value.items()}
        return [finite(v) for v in value] if isinstance(value, list | tuple) else value

    return json.dumps(finite(record), ensure_ascii=False, allow_nan=False) + "\n"


def append_line(path: Path, line: str) -> None:
    """Append a line and force it to disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a run.

    Raises `UserError` for a file that is not there or not JSON lines.
    """
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        raise UserError(f"no records in {path.parent}: give the folder of a run") from None
    except ValueError as error:
        raise UserError(f"{path} is not a file of records: {error}") from None


def differences(mine: Any, theirs: Any, name: str = "") -> Iterable[str]:
    """The settings in which two nested dicts differ: `optimizer.lr=0.01 there, 0.001 here`."""
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        for key in [*mine, *(k for k in theirs if k not in mine)]:
            prefix = f"{name}.{key}" if name else str(key)
            yield from differences(mine.get(key), theirs.get(key), prefix)
        if list(mine) != list(theirs) and mine.keys() == theirs.keys():
            yield f"{name}: another order"
    elif mine != theirs:
        yield f"{name}={theirs} there, {mine} here"
