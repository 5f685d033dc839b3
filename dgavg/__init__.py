"""dgavg: domain generalization by chains of trainers, any number of averages from one run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dgavg.batch import Batch, Loss
from dgavg.chain import chain, check
from dgavg.errors import UserError
from dgavg.fit import fit
from dgavg.run import Run
from dgavg.trainer import Candidate, Trainer, state, trainer

if TYPE_CHECKING:
    from dgavg.benchmark import Table, leave_one_domain_out

__version__ = "0.1.0"
__all__ = [
    "Batch",
    "Candidate",
    "Loss",
    "Run",
    "Table",
    "Trainer",
    "UserError",
    "chain",
    "check",
    "fit",
    "leave_one_domain_out",
    "state",
    "trainer",
]


def __getattr__(name: str) -> Any:
    """Import the benchmark when it is asked for: it needs Hydra and pandas, training does not."""
    if name in ("Table", "leave_one_domain_out"):
        from dgavg import benchmark

        return getattr(benchmark, name)
    raise AttributeError(f"module 'dgavg' has no attribute {name!r}")
