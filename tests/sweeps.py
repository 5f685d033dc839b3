"""What tests of sweeps share: a small sweep, real processes, and what they leave."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from dgavg import cli

SMALL = ["model.width=8", "protocol.steps=8", "protocol.eval_every=4"]
SWEEP = ["-m", "trainer=basic,ema_basic,coral_basic", "holdout=[0,45]", "seed=0,1", *SMALL]
JOBLIB = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]


def start(folder, *words):
    """A real `python -m dgavg` process in a session of its own, with pipes for its output."""
    return subprocess.Popen(
        [sys.executable, "-m", "dgavg", *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def dgavg(folder, *words, status=0, runs=True):
    """What `dgavg` prints on standard output, and on standard error.

    Here, so that the processes of joblib stay for the next test. They have a working directory of
    their own, so `runs` is given whole.
    """
    out, error = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(error):
        given = not runs or any(word.startswith("runs=") for word in words)
        found = cli.main([*words, *([] if given else [f"runs={folder}/runs"])])
    assert found == status, error.getvalue()
    return out.getvalue(), error.getvalue()


def records(folder):
    """The records of all finished runs below a folder, without what differs from time to time."""
    found = {}
    for done in sorted(Path(folder).rglob("done")):
        lines = [json.loads(x) for x in (done.parent / "records.jsonl").read_text().splitlines()]
        found[str(done.parent.relative_to(folder))] = [
            {k: v for k, v in line.items() if k != "timing"} for line in lines
        ]
    return found


def weights(folder):
    """The bytes of all weights below a folder."""
    files = sorted(Path(folder).rglob("*.safetensors"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
