"""The files of runs: checkpoints, weights, records."""

from __future__ import annotations

import json
import math
import pickle
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor
from torch.serialization import get_crc32_options, set_crc32_options

from dgavg.disk import write_atomically
from dgavg.errors import UserError

FORMAT = "dgavg checkpoint 1"
RECORD = frozenset(
    ("step", "held_out", "seed", "chain", "trainer", "data", "protocol", "candidates")
)  # what every reader of a record needs


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint of tensors, numbers, strings, lists and dicts."""
    with _without_checksums():
        write_atomically(path, lambda file: torch.save({"format": FORMAT, **content}, file))


@contextmanager
def _without_checksums() -> Iterator[None]:
    """`torch.load` never looks at them, and they cost as much as the writing itself."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, without running any code in it.

    Raises `UserError` for a file that is truncated or not a checkpoint of dgavg.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # about files that are refused anyway
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
    """Write weights by name as safetensors; `notes` go into the file's metadata.

    As one entry, since safetensors shuffles entries and equal weights shall be equal files.
    """
    tensors = {k: v.detach().cpu().clone().contiguous() for k, v in weights.items()}
    data = safetensors_bytes(tensors, metadata={"dgavg": json.dumps(dict(notes))})
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


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a run that has ended.

    Raises `UserError` for a file that is not there, empty, or damaged.
    """
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        whole = bool(records) and all(record.keys() >= RECORD for record in records)
    except (OSError, ValueError, AttributeError):
        whole = False
    if not whole:
        raise UserError(
            f"{path} is missing or damaged; delete {path.parent} to train that run anew"
        )
    return records


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
