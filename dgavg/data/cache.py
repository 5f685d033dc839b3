"""Images decoded once: one file of pixels for a data set and size, mapped by every run.

The file's name is a hash of all that its pixels come from: the digests of the images, their names,
the size and the decoder. It holds the pixels, uint8 (N, 3, size, size), then what else is known of
them as JSON, the length of that, and `MAGIC`. What ends in another way is no cache and is built
again. It is written beside and renamed, by one process while the others wait.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from dgavg.data.decode import Bad, Pixels, decode_all, decoder
from dgavg.data.digests import digests, index_bytes, read_index, stamps
from dgavg.errors import UserError, require

FOLDER = ".dgavg-cache"
MAGIC = b"dgavg images 1\0\0"
TAIL = 8 + len(MAGIC)  # the length of the JSON, and MAGIC
NORESERVE = 0x4000  # Linux's MAP_NORESERVE, which the module `mmap` lacks
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Fingerprint = Callable[[Tensor, Sequence[Bad]], str]
Store = Callable[[int, Pixels], object]


@dataclass(frozen=True)
class Stored:
    """Decoded images (N, 3, size, size), which files could not be read, and a hash of it all."""

    images: Tensor
    bad: tuple[Bad, ...]
    content: str


class CannotBuildError(Exception):
    """There is no cache yet, and its folder can't be written: the message says why."""


def cached_images(
    place: Path,
    root: Path,
    tree: Mapping[str, Mapping[str, Sequence[str]]],
    size: int,
    *,
    skip: bool,
    workers: int,
    fingerprint: Fingerprint,
) -> Stored:
    """The images of a tree of names below `root`, out of the cache in `place`, built if need be.

    The images are mapped privately: whoever writes to them changes his own copy alone.
    `fingerprint` makes the hash that is kept beside them; what it raises ends the building.

    Raises `UserError` for an image that can't be read, unless they are to be skipped, for images
    that change meanwhile, and for a full disk; `CannotBuildError` where `place` can't be written.
    """
    names = [name for by_class in tree.values() for files in by_class.values() for name in files]
    index_path = place / f"index-{_hash(str(root.resolve()), 8)}.json"
    known = read_index(index_path)
    found, index = digests(root, names, known, workers)
    key = _hash(json.dumps([decoder(), size, tree, found]), 16)
    path = place / f"{key}.images"
    stored = read(path, size)
    if stored is None:
        with _locked(place):
            stored = read(path, size)  # somebody else may have built it meanwhile
            if stored is None:
                before = stamps(root, names)

                def fill(store: Store) -> list[Bad]:
                    paths = [root / name for name in names]
                    return decode_all(paths, size, store, skip=skip, workers=workers)

                def finish(images: Tensor, bad: Sequence[Bad]) -> str:
                    same = before == stamps(root, names)
                    require(same, f"images in {root} changed while they were read; start again")
                    return fingerprint(images, bad)

                _build(path, len(names), size, fill, finish)
                stored = read(path, size)
    require(stored is not None, f"{path} vanished while it was read; start again")
    assert stored is not None
    if known | index != known:
        with suppress(OSError):  # it only saves time
            _write(index_path, index_bytes(known | index))
    return stored


def read(path: Path, size: int) -> Stored | None:
    """Map a cache file; None where it is missing, truncated or not ours."""
    try:
        with path.open("rb") as file:
            total = file.seek(0, os.SEEK_END)
            file.seek(total - TAIL)
            tail = file.read()
            length = int.from_bytes(tail[:8], "little")
            file.seek(total - TAIL - length)
            about = json.loads(file.read(length))
            end = about["rows"] * 3 * size**2
            if tail[8:] != MAGIC or about["key"] != path.stem or end + length + TAIL != total:
                return None
            bad = tuple((int(i), str(why)) for i, why in about["bad"])
            return Stored(_images(file.fileno(), about["rows"], size), bad, about["content"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None


def _images(fd: int, rows: int, size: int) -> Tensor:
    """The first bytes of a file as images; a write makes a copy that is the process's own."""
    length = rows * 3 * size**2
    if not length:
        return torch.zeros(0, 3, size, size, dtype=torch.uint8)
    if sys.platform == "linux":  # no memory is set aside for copies: the file may be larger
        flags = mmap.MAP_PRIVATE | NORESERVE
        memory = mmap.mmap(fd, length, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    else:
        memory = mmap.mmap(fd, length, access=mmap.ACCESS_COPY)
    return torch.frombuffer(memory, dtype=torch.uint8).view(rows, 3, size, size)


def _build(
    path: Path, n: int, size: int, fill: Callable[[Store], list[Bad]], finish: Fingerprint
) -> None:
    """Write `n` images into a file beside `path`, then rename it. The lock is held."""
    for left in path.parent.glob("*.part"):  # by builders that were killed
        left.unlink(missing_ok=True)
    row, part = 3 * size**2, path.with_suffix(".part")
    try:
        with part.open("wb+") as file:
            fd = file.fileno()
            _reserve(fd, n * row)
            bad = fill(lambda i, pixels: _put(fd, pixels, i * row))
            _close_gaps(fd, row, n, {i for i, _ in bad})
            rows = n - len(bad)
            content = finish(_images(fd, rows, size), bad)
            about = {"key": path.stem, "rows": rows, "bad": bad, "content": content}
            text = json.dumps(about).encode()
            file.seek(rows * row)
            file.write(text + len(text).to_bytes(8, "little") + MAGIC)
            file.truncate()
            file.flush()
            os.fsync(fd)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(_refused(path.parent, error, n * row)) from error
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _reserve(fd: int, length: int) -> None:
    """Ask for the whole space now, so that a full disk shows before the work and not after it."""
    if length and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, length)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system without it
                raise


def _put(fd: int, pixels: Pixels, at: int) -> None:
    left = pixels.data.cast("B")
    while left:
        written = os.pwrite(fd, left, at)
        left, at = left[written:], at + written


def _close_gaps(fd: int, row: int, rows: int, bad: set[int]) -> None:
    """Move the images that follow one that could not be read."""
    new = min(bad, default=rows)
    for old in range(new, rows):
        if old not in bad:
            os.pwrite(fd, os.pread(fd, row, old * row), new * row)
            new += 1


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    """Keep other builders out of the folder; say so where one has to be waited for."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place / ".lock")
        try:
            lock.acquire(timeout=1)
        except Timeout:
            print(f"another process decodes images into {place}: waiting", file=sys.stderr)
            lock.acquire()
    except OSError as error:
        if error.errno in NO_ROOM:
            raise UserError(_refused(place, error, 0)) from error
        raise CannotBuildError(error.strerror or str(error)) from error
    try:
        yield
    finally:
        lock.release()


def _refused(place: Path, error: OSError, need: int) -> str:
    why = error.strerror or str(error)
    return (
        f"decoded images cannot be written to {place} ({why}; they need {need / 2**30:.2f} GiB): "
        "set data.cache=FOLDER to one with room, data.cache=none to hold them in memory, "
        "or a smaller data.size"
    )


def _write(path: Path, data: bytes) -> None:
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        beside.write_bytes(data)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _hash(text: str, size: int) -> str:
    return blake2b(text.encode("utf-8", "surrogateescape"), digest_size=size).hexdigest()
