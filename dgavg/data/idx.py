"""Reading idx files, the format of MNIST, plain or as .gz."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dgavg.errors import UserError, require

_UINT8 = 0x08


def read_idx(path: Path, ndim: int) -> Tensor:
    """The uint8 array in an idx file: 1 dimension for labels, 3 for grey images (N, H, W).

    Source: LeCun's description of the MNIST files: two zero bytes, the type, the number of
    dimensions, each size as a big-endian int32, then the values.

    Raises `UserError` for a file that cannot be read, is no idx file of bytes with `ndim`
    dimensions, or is shorter or longer than its header says.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        again = "fetch it again"
        raise UserError(f"{path} cannot be read ({error}); {again}") from error
    require(
        content[:4] == bytes((0, 0, _UINT8, ndim)) and len(content) >= 4 + 4 * ndim,
        f"{path} is no idx file of bytes with {ndim} dimension(s): it begins with "
        f"{content[:4].hex(' ') or 'nothing'}, not 00 00 08 {ndim:02x}; fetch the original file",
    )
    shape = tuple(int(n) for n in np.frombuffer(content, ">i4", count=ndim, offset=4))
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * ndim)
    require(
        min(shape) >= 0 and len(values) == math.prod(shape),
        f"{path} holds {len(values)} values where its header promises {shape}; the file is damaged"
        " or cut short, so fetch it again",
    )
    return torch.from_numpy(values.copy()).reshape(shape)
