"""Images from files: read once, in threads, as the bytes that models are trained on."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features
from PIL import __version__ as pillow
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dgavg.errors import require

Pixels = NDArray[np.uint8]
Bad = tuple[int, str]  # the number of an image that can't be read, and why
T = TypeVar("T")
R = TypeVar("R")

TASK = 16  # files a thread takes at once
MOMENT = 1.0  # seconds that need no bar


def decoder() -> str:
    """What decodes: where this differs, so may the pixels."""
    codecs = [f"{name} {features.version_codec(name)}" for name in ("jpg", "zlib", "libtiff")]
    return ", ".join([f"pillow {pillow}", *codecs, f"webp {features.version_module('webp')}"])


def decode(path: Path, out: Pixels) -> str | None:
    """Read one image into `out` uint8 (3, H, W); why it could not be, or None.

    It is made RGB and resized whole (Pillow's bilinear, antialiased).
    """
    size = out.shape[2], out.shape[1]
    try:
        with Image.open(path) as image:
            pixels = image.convert("RGB").resize(size, Image.Resampling.BILINEAR)
    except Exception as error:  # Pillow's decoders raise many kinds for a broken file
        return str(error).split("\n")[0] or type(error).__name__
    out[:] = np.asarray(pixels).transpose(2, 0, 1)
    return None


def decode_all(
    paths: Sequence[Path],
    size: int,
    store: Callable[[int, Pixels], object],
    *,
    skip: bool,
    workers: int,
) -> list[Bad]:
    """Hand each image (3, size, size) to `store` with its number; gives those that can't be read.

    `store` is called in threads. Raises `UserError` for the first image that can't be read, unless
    they are to be skipped; the rest is not decoded then.
    """

    def one(i: int) -> str | None:
        pixels = np.empty((3, size, size), np.uint8)
        problem = decode(paths[i], pixels)
        if problem is None:
            store(i, pixels)
        return problem

    bad = []
    for i, problem in enumerate(threaded(one, range(len(paths)), workers, "decoding images")):
        if problem is not None:
            require(skip, unreadable(paths[i], problem))
            bad.append((i, problem))
    return bad


def unreadable(path: Path, problem: str) -> str:
    """What is said of an image that can't be read."""
    return f"{path} cannot be read ({problem}); mend it or set data.on_bad_image=skip"


def threaded(
    work: Callable[[T], R], items: Sequence[T], workers: int, title: str = ""
) -> Iterator[R]:
    """What `work` makes of the items, in order, done by threads (0: one for each processor).

    With a title a bar shows how far it is. Where it ends early, the rest is not begun.
    """
    parts = [items[i : i + TASK] for i in range(0, len(items), TASK)]
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        try:
            done = pool.map(lambda part: [work(item) for item in part], parts)
            yield from shown((r for part in done for r in part), len(items), title)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def shown(items: Iterable[R], total: int, title: str) -> Iterator[R]:
    """Pass on the items; after a moment a bar on standard error, if it is a terminal, says how far.

    Without a title there is none.
    """
    console = Console(file=sys.stderr)
    columns = TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=console, transient=True)
    began, started = time.monotonic(), not (title and console.is_terminal)
    quiet = started
    task = bar.add_task(title, total=total)
    try:
        for i, item in enumerate(items):
            if not started and time.monotonic() - began > MOMENT:
                bar.start()
                started = True
            if not quiet:
                bar.update(task, completed=i + 1)
            yield item
    finally:
        if started and not quiet:
            bar.stop()
