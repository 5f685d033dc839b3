"""A model as a program of its own: torch.export and ONNX, normalisation included."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgavg.deploy.library import TOLERANCE, largest_difference, random_images
from dgavg.deploy.saved import Saved
from dgavg.errors import UserError, require

EXTRA = "--onnx needs onnx, onnxscript and onnxruntime; install them with pip install 'dgavg[onnx]'"
SIZES = (1, 2, 5)  # batches to compare on; 2 is what is traced


def write_torch_export(run: Saved, path: Path) -> float:
    """Write a `torch.export` program (.pt2) of any batch size.

    Float RGB images (N, C, H, W) in [0, 1] to logits (N, classes). Returns the largest difference
    from the model on random images, of the file as it is read again.

    Raises `UserError` where the model can't be traced, or differs by more than 1e-4.
    """
    with _explained("torch.export"):
        torch.export.save(_traced(run), path)
        program = torch.export.load(path).module()
    return _checked(run, path, program)


def write_onnx(run: Saved, path: Path) -> float:
    """Write an ONNX model of any batch size, `images` to `logits`; else as `write_torch_export`.

    Raises `UserError`, also where the packages of the extra `onnx` are missing.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter is written in it)
    except ImportError as error:
        raise UserError(EXTRA) from error
    with _explained("the ONNX exporter"):
        program = torch.onnx.export(
            _traced(run),
            input_names=["images"],
            output_names=["logits"],
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        program.save(str(path), external_data=False)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return _checked(
        run, path, lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])
    )


def _traced(run: Saved) -> torch.export.ExportedProgram:
    batch = {0: torch.export.Dim.DYNAMIC}
    return torch.export.export(run.model, (random_images(run, 2),), dynamic_shapes=(batch,))


@torch.no_grad()
def _checked(run: Saved, path: Path, program: Callable[[Tensor], Any]) -> float:
    """The largest difference; the file is removed where it is too large."""
    found = 0.0
    for size in SIZES:
        images = random_images(run, size)
        found = max(found, largest_difference(program(images), run.model(images)))
    if not found <= TOLERANCE:
        path.unlink()
    require(
        found <= TOLERANCE,
        f"{path.name} was not written: its outputs differ from the model's by {found:.2g}, more "
        f"than {TOLERANCE:g}",
    )
    return found


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """An exporter's many exceptions as one line, without its warnings about its own code."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{what} can't handle this model ({reason}); leave it out") from error
    finally:
        logger.setLevel(level)
