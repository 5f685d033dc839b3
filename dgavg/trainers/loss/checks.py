"""What penalties refuse."""

from __future__ import annotations

import math

from dgavg.distributed import ranks
from dgavg.errors import require
from dgavg.run import Run


def check_weight(name: str, weight: float) -> None:
    """Raise `UserError` for a weight that is no finite number from 0 on."""
    require(
        math.isfinite(weight) and weight >= 0,
        f"trainer.{name}.weight={weight}: a finite number from 0 on",
    )


def check_rows(name: str, run: Run) -> None:
    """Raise `UserError` where a batch has one image of each domain: no halves, no covariance."""
    rows = len(run.batches(0).y) * ranks() // len(run.names)
    require(rows > 1, f"{name} needs at least 2 images of each domain a batch")
