"""Records as TensorBoard's event files, for `logger=tensorboard`."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dgavg.errors import UserError


def summary_writer() -> Any:
    """TensorBoard's `SummaryWriter`.

    Raises `UserError` where TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "logger=tensorboard needs TensorBoard: pip install 'dgavg[tensorboard]'"
        ) from None
    return SummaryWriter


class EventFiles:
    """The scalars of a run in `folder`, written anew from `records` and then record by record.

    So a run that goes on after a kill has each of them once, whatever had reached the disk.
    """

    def __init__(self, folder: Path, records: Iterable[Mapping[str, Any]]) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        self.writer = summary_writer()(str(folder))
        for record in records:
            self.write(record)

    def write(self, record: Mapping[str, Any]) -> None:
        """Add the losses, and every candidate's accuracy on every split."""
        step = record["step"]
        for name, value in record["losses"].items():
            self.writer.add_scalar(f"loss/{name}", value, step)
        for name, found in record["candidates"].items():
            for split, score in found["splits"].items():
                self.writer.add_scalar(f"{name}/{split}", score["accuracy"], step)
        self.writer.flush()

    def close(self) -> None:
        """End the file."""
        self.writer.close()
