"""Images in any folder, decoded in threads just ahead of the model, as training data are."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from dgavg.data.decode import decode
from dgavg.data.folder import EXTENSIONS
from dgavg.errors import require

Decoded = np.ndarray | str  # uint8 (C, H, W), or why there is none


def image_files(place: Path) -> list[Path]:
    """The images in a folder at any depth, sorted, or one image; paths as seen from the folder.

    Names that begin with a dot and files that are no images are passed over, as in training data.

    Raises `UserError` where there is none.
    """
    if place.is_file():
        return [Path(place.name)]
    require(place.is_dir(), f"no folder or image {place}")
    found: list[Path] = []
    seen: set[str] = set()
    for here, folders, names in os.walk(place, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:  # a link to a folder above would never end
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = Path(here).relative_to(place)
        found += [
            relative / name
            for name in names
            if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
        ]
    require(bool(found), f"no image in {place}; files that end in {' '.join(EXTENSIONS)} are read")
    return sorted(found)


def check_shape(shape: Sequence[int]) -> None:
    """Raise `UserError` for an input (C, H, W) that no image file can be made."""
    channels, height, width = shape
    require(
        channels in (1, 3) and height * width > 1,
        f"the run was trained on {'×'.join(map(str, shape))} inputs, and images have 1 or 3 "
        "channels: features and such can't be read from image files",
    )


def read_image(path: Path, shape: Sequence[int]) -> Decoded:
    """One image as uint8 (C, H, W), as training data are read; or why it can't be."""
    channels, height, width = shape
    pixels = np.empty((channels, height, width), np.uint8)
    if channels == 3:
        return decode(path, pixels) or pixels
    try:
        with Image.open(path) as image:
            grey = image.convert("L").resize((width, height), Image.Resampling.BILINEAR)
    except Exception as error:  # Pillow's decoders raise many kinds for a broken file
        return str(error).split("\n")[0] or type(error).__name__
    pixels[0] = np.asarray(grey)
    return pixels


def decoded(paths: Sequence[Path], shape: Sequence[int], ahead: int) -> Iterator[Decoded]:
    """What `read_image` makes of every path, in their order; at most `ahead` are held at a time."""
    waiting: deque[Future[Decoded]] = deque()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            left = iter(paths)
            waiting.extend(pool.submit(read_image, path, shape) for path in islice(left, ahead))
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(read_image, path, shape) for path in islice(left, 1))
        finally:
            pool.shutdown(cancel_futures=True)  # whoever stops reading waits for no more
