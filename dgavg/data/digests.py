"""Digests of files' contents, remembered so that a file is read again only if it may have changed.

A file is taken for unchanged while its length and its times of last write and change are the same
to the nanosecond. A file that changed within the last moments is not remembered: a second write in
the same tick of the clock would leave no trace.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from dgavg.data.decode import threaded

FORMAT = "dgavg digests 1"
FRESH = 2_000_000_000  # nanoseconds

Stamp = tuple[int, int, int]  # bytes, ns of the last write, ns of the last change
Index = dict[str, list[Any]]  # by name: the stamp's numbers and the digest


def digests(
    root: Path, names: Sequence[str], known: Index, workers: int = 0
) -> tuple[list[str], Index]:
    """The digest of each file below `root`, and what to remember; only what changed is read.

    A file that can't be read has a digest of its own and is not remembered.
    """
    began = time.time_ns()
    now = stamps(root, names)
    found: dict[str, str] = {}
    for name, stamp in zip(names, now, strict=True):
        if stamp is not None and name in known and known[name][:3] == list(stamp):
            found[name] = known[name][3]
    changed = [name for name in names if name not in found]
    read = threaded(lambda name: _digest(root / name), changed, workers, "reading images")
    found |= dict(zip(changed, read, strict=True))
    index: Index = {}
    for name, stamp in zip(names, now, strict=True):
        if stamp is not None and stamp[2] < began - FRESH and found[name]:
            index[name] = [*stamp, found[name]]
    return [found[name] for name in names], index


def read_index(path: Path) -> Index:
    """What was remembered; nothing where the file is missing, damaged, or not ours."""
    try:
        content = json.loads(path.read_bytes())
        files = content["files"] if content["format"] == FORMAT else {}
        whole = all(
            isinstance(entry, list) and len(entry) == 4 and isinstance(entry[3], str)
            for entry in files.values()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return files if whole else {}


def index_bytes(index: Index) -> bytes:
    """An index as `read_index` takes it."""
    return json.dumps({"format": FORMAT, "files": index}).encode()


def stamps(root: Path, names: Sequence[str]) -> list[Stamp | None]:
    """What tells whether files have changed; None for one that is not there."""
    return [_stamp(root / name) for name in names]


def _stamp(path: Path) -> Stamp | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _digest(path: Path) -> str:
    try:
        return blake2b(path.read_bytes(), digest_size=16).hexdigest()
    except OSError:
        return ""
