"""Two real processes that train together: a test module runs itself once a rank."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta

import torch
from torch import nn

from dgavg import Batch, buckets
from dgavg.models import Model
from dgavg.testing import ToyBatches


def join(rank, folder):
    """Make this process one of two; each waits for the other at most 100 s.

    Buckets of gradients are as small as the models, so that there are several.
    """
    buckets.SIZE = 64
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=100),  # a rank that waits for nobody fails
    )


class Half(ToyBatches):
    """Toy batches of which each rank has its half of the rows of each domain."""

    def __init__(self, rank):
        super().__init__()
        self.rank = rank

    def __call__(self, t):
        batch = super().__call__(t)
        half = slice(self.rank * self.rows // 2, (self.rank + 1) * self.rows // 2)
        parts = [batch.by_domain(rows)[:, half].flatten(0, 1) for rows in (batch.x, batch.y)]
        return Batch(*parts, batch.by_domain(batch.d)[:, half].flatten(), batch.domains)


def smooth_model():
    """For toy batches, without batch norm, so that ranks can be as one process to rounding."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Flatten(), nn.Linear(4, 8), nn.Tanh()]
        return Model(nn.Sequential(*layers), nn.Linear(8, 3)).train()


def started(module, folder):
    """What `python MODULE RANK FOLDER` saved as FOLDER/RANK.pt, for both ranks."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", module, str(rank), str(folder)],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [p.returncode for p in processes] == [0, 0], "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]
