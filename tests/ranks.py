"""Two real processes that train together: a test module runs itself once a rank."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta

import torch


def join(rank, folder):
    """Make this process one of two; each waits for the other at most 100 s."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=100),  # a rank that waits for nobody fails
    )


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
