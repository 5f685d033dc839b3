"""The real command under torchrun: one set of files, one table, and the numbers of one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

SMALL = [
    *("model.width=16", "protocol.eval_every=6", "holdout=[30]", "seeds=[0]", "name=x"),
    *("trainer=ema_sma_coral_basic", "trainer.sma.start=4", "trainer.ema.decay=0.8"),
]
SMOOTH = [*SMALL, "model.batchnorm=false", "protocol.steps=12", "optimizer.lr=1e-3"]
LONG = [*SMALL, "model.dropout=0.2", "protocol.steps=300", "protocol.eval_every=100"]
RUN = "runs/x/30/0"


def begun(folder, *arguments, processes):
    """A real `python -m dgavg`, by itself or on several processes."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    start = [sys.executable, *(torchrun if processes > 1 else []), "-m", "dgavg", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.Popen(
        start,
        cwd=folder,
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(folder, *arguments, processes):
    """Exit status, standard output and standard error."""
    folder.mkdir(exist_ok=True)
    process = begun(folder, *arguments, processes=processes)
    out, error = process.communicate(timeout=200)
    return process.returncode, out, error


def records_of(folder):
    lines = (folder / RUN / "records.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k != "timing"} for x in lines]


def files_of(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def numbers(value, name=""):
    """The numbers of nested dicts and lists, by path."""
    if isinstance(value, dict):
        return {k: v for key in value for k, v in numbers(value[key], f"{name}/{key}").items()}
    if isinstance(value, list):
        return numbers({str(i): v for i, v in enumerate(value)}, name)
    return {name: value} if isinstance(value, float) else {}


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory):
    """Folder and output of a run on one process, and on two."""
    top = tmp_path_factory.mktemp("runs")
    found = []
    for processes in (1, 2):
        folder = top / str(processes)
        status, out, error = ended(folder, *SMOOTH, processes=processes)
        assert status == 0, error
        found.append((folder, out, error))
    return found


def test_two_processes_leave_the_files_of_one(one_and_two):
    (one, _, _), (two, _, _) = one_and_two
    assert files_of(one) == files_of(two)
    assert "processes: 2" in (two / RUN / "config.yaml").read_text()
    assert "processes" not in (one / RUN / "config.yaml").read_text()


def test_two_processes_have_the_records_of_one(one_and_two):
    ours, theirs = (records_of(folder) for folder, _, _ in one_and_two)
    assert [r["step"] for r in ours] == [r["step"] for r in theirs] == [6, 12]
    assert [r.pop("processes") for r in theirs] == [2, 2]
    expected, found = numbers(ours), numbers(theirs)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        one_image = 0.02  # of a split, that rounding may tip over
        assert value == pytest.approx(
            expected[name], rel=1e-3, abs=one_image if "accuracy" in name else 1e-4
        ), name


def test_two_processes_have_the_weights_of_one(one_and_two):
    for name in ("live", "ema", "sma"):
        one, two = (load_file(f / RUN / f"weights/{name}.safetensors") for f, _, _ in one_and_two)
        assert one.keys() == two.keys()
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-4, msg=f"{name} {key}")


def test_one_process_prints(one_and_two):
    (_, one, _), (_, two, error) = one_and_two
    assert [line.split()[0] for line in two.splitlines() if line] == [
        line.split()[0] for line in one.splitlines() if line
    ]
    assert error.count("hold out 30, seed 0 [1/1]") == 1


def test_a_folder_that_is_taken_is_waited_for_by_all_processes(tmp_path):
    (tmp_path / RUN).mkdir(parents=True)
    with FileLock(tmp_path / RUN / ".lock"):
        process = begun(tmp_path, *SMOOTH, processes=2)
        line = f"another process is training in {RUN}: left to it for now\n"
        assert line in iter(process.stderr.readline, "")
        assert files_of(tmp_path) == [f"{RUN}/.lock"]
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert "left to it" not in error
    assert out.count("ema_sma_coral_basic  live") == 1


def test_other_commands_run_once(tmp_path):
    status, out, error = ended(tmp_path, "list", "trainers", "sma", processes=2)
    assert status == 0, error
    assert out.count("Cost:") == 1


def checkpoint_of(folder):
    saved = torch.load(folder / RUN / "checkpoint.pt", weights_only=True)
    return saved["run"]


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def workers_of(process):
    """The process ids that torchrun started, by rank."""
    found = {}
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        words = Path(f"/proc/{pid}/environ").read_text().split("\0")
        found |= {int(w.removeprefix("RANK=")): int(pid) for w in words if w.startswith("RANK=")}
    return found


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc"), reason="finds the workers in /proc")
def test_a_killed_run_goes_on_to_the_bit_on_as_many_processes_and_on_no_other_number(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    status, _, error = ended(whole, *LONG, processes=2)
    assert status == 0, error
    killed.mkdir()
    process = begun(killed, *LONG, processes=2)
    while process.poll() is None and not (killed / RUN / "checkpoint.pt").exists():
        time.sleep(0.02)
    os.kill(workers_of(process)[1], signal.SIGKILL)
    process.communicate(timeout=100)
    assert process.returncode != 0
    assert not (killed / RUN / "done").exists()
    status, out, error = ended(killed, *LONG, processes=1)
    assert (status, out) == (2, "")
    assert error == (
        "dgavg: runs/x/30/0 is of a run on 2 processes, here 1: go on with torchrun "
        "--nproc-per-node 2\n"
    )
    status, _, error = ended(killed, *LONG, processes=2)
    assert status == 0, error
    assert records_of(killed) == records_of(whole)
    assert same(checkpoint_of(killed), checkpoint_of(whole))
    one, other = checkpoint_of(whole)["random"]
    assert not same(one, other)
