"""Small runs, real processes, and what tells two runs apart."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pictures import pictures
from safetensors.torch import load_file

from dgavg import leave_one_domain_out

KILLER = Path(__file__).with_name("killer.py")


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


@pytest.fixture(scope="session")
def start():
    """`start(folder, *arguments)`: a real `python -m dgavg` process, with pipes for its output."""

    def run(folder, *arguments, **options):
        return subprocess.Popen(
            [sys.executable, "-m", "dgavg", *arguments],
            cwd=folder,
            env=_environment(),
            stdout=options.pop("stdout", subprocess.PIPE),
            stderr=options.pop("stderr", subprocess.PIPE),
            text=True,
            # A parent that ignores Ctrl-C, as one in the background does, hands that down.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            **options,
        )

    return run


@pytest.fixture(scope="session")
def run_and_kill():
    """`run_and_kill([(folder, arguments, moment), ...])`: see killer.py; gives how each ended."""

    def run(jobs):
        for folder, _, _ in jobs:
            Path(folder).mkdir(exist_ok=True)
        done = subprocess.run(
            [sys.executable, str(KILLER)],
            input=json.dumps([[str(folder), list(words), at] for folder, words, at in jobs]),
            env=_environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), done.stderr

    return run


@pytest.fixture(scope="session")
def only_run():
    """`only_run(folder)`: the folder of the one run below it."""

    def find(folder):
        (config,) = Path(folder).rglob("config.yaml")
        return config.parent

    return find


@pytest.fixture(scope="session")
def records_of():
    """`records_of(run)`: its records without `timing`, which may differ from time to time."""

    def read(run):
        lines = (run / "records.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(x).items() if k != "timing"} for x in lines]

    return read


@pytest.fixture(scope="session")
def content_of(records_of):
    """`content_of(run)`: all that two runs must agree on to be equal to the bit."""

    def read(run):
        saved = torch.load(run / "checkpoint.pt", weights_only=True)
        weights = {p.name: p.read_bytes() for p in (run / "weights").iterdir()}
        return {
            "files": sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()),
            "records": records_of(run),
            "weights": weights,
            "checkpoint": _hashable(saved["run"]),
            "lines": [json.loads(x)["step"] for x in saved["records"]],
        }

    return read


def _hashable(value):
    """Tensors as type, shape and bytes, so that == compares them to the bit."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {k: _hashable(v) for k, v in value.items()}
    return [_hashable(v) for v in value] if isinstance(value, list | tuple) else value


@pytest.fixture(scope="session")
def weights_of():
    """`weights_of(run)`: the tensors of every file of weights, by candidate."""
    return lambda run: {p.stem: load_file(p) for p in sorted((run / "weights").iterdir())}


@pytest.fixture(scope="session")
def make_data():
    """`make_data([90, 80, 85])`: domains of noisy 8×8 pictures of 3 classes that can be learnt."""

    def make(sizes, name="toy", seed=5):
        return pictures({f"d{i}": n for i, n in enumerate(sizes)}, name, seed=seed)

    return make


@pytest.fixture
def train(tmp_path, make_data):
    """`train("ema_basic", steps=30, ...)`: the Python door on small data; gives table and folder.

    Keywords with two underscores are dotted settings: `optimizer__lr=1e-3`.
    """

    def run(trainer="ema_basic", data=None, *, folder="runs", steps=24, every=8, **settings):
        dotted = {"model.width": 16, "protocol.steps": steps, "protocol.eval_every": every}
        dotted |= {k.replace("__", "."): v for k, v in settings.items()}
        given = {k: dotted.pop(k) for k in ("seeds", "holdout", "name", "quiet") if k in dotted}
        table = leave_one_domain_out(
            trainer,
            make_data([60, 70, 65]) if data is None else data,
            settings=dotted,
            runs=tmp_path / folder,
            **{"seeds": [0], "holdout": ["d1"], "quiet": True} | given,
        )
        return table, tmp_path / folder

    return run
