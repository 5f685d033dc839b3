"""Sweeps on joblib's processes: the same numbers, failures, kills, two at once."""

from __future__ import annotations

import os
import random
import re
import shlex
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock
from sweeps import JOBLIB, SMALL, SWEEP, dgavg, records, start, weights

pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
TWO = ["trainer=basic", "holdout=[0,45]", "seed=0", *SMALL, "name=x"]


@pytest.fixture(scope="module")
def sequential(tmp_path_factory):
    """The folder and the table of the sweep in one process, undisturbed."""
    folder = tmp_path_factory.mktemp("sequential")
    out, error = dgavg(folder, *SWEEP)
    assert len(error.splitlines()) == 12
    return folder / "runs", out


def test_two_processes_leave_what_one_leaves(sequential, tmp_path):
    runs, table = sequential
    out, error = dgavg(tmp_path, *JOBLIB, *SWEEP)
    assert out == table
    first, *lines = error.splitlines()
    assert first == "12 runs on joblib, each a job of its own"
    assert [line.partition("]")[0] for line in lines] == [f"[{i}/12" for i in range(1, 13)]
    told = {re.search(r"(\w+), hold out (\d+), seed (\d):", line).groups() for line in lines}
    assert len(told) == 12
    assert records(tmp_path / "runs") == records(runs)
    assert len(records(runs)) == 12
    assert weights(tmp_path / "runs") == weights(runs)
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == sorted(
        p.name for p in runs.iterdir()
    )  # no report is left
    out, error = dgavg(tmp_path, *JOBLIB, *SWEEP)
    assert out == table
    assert error.count("(done before)") == 12


@pytest.mark.parametrize("launcher", [[], JOBLIB], ids=["basic", "joblib"])
def test_a_failing_run_stops_no_other_and_its_command_repeats_it(launcher, tmp_path):
    blocked = tmp_path / "runs/x/0/0"
    blocked.mkdir(parents=True)
    (blocked / "config.yaml").write_text("garbage")
    out, error = dgavg(tmp_path, *launcher, "-m", *TWO, status=2)
    assert re.search(r"^basic +live +\d", out, re.MULTILINE)
    why = f"{blocked}/config.yaml is damaged or not of dgavg; delete {blocked} to train that run"
    *_, reason, again, last = error.splitlines()
    assert reason == f"dgavg: {why} anew"
    assert last == "dgavg: 1 failed; the same command tries again what is not done"
    mark, _, line = again.partition(": ")
    assert mark == "  again"
    words = shlex.split(line)
    runs = f"runs={tmp_path}/runs"
    assert words == ["dgavg", "trainer=basic", *SMALL, "name=x", runs, "holdout=[0]", "seed=0"]
    assert dgavg(tmp_path, *words[1:], status=2)[1] == f"dgavg: {why} anew\n"
    (blocked / "config.yaml").unlink()
    dgavg(tmp_path, *words[1:])
    assert list(records(tmp_path / "runs/x")) == ["0/0", "45/0"]
    assert not (tmp_path / "runs/.sweeps").exists()


@pytest.mark.parametrize("launcher", [[], JOBLIB], ids=["basic", "joblib"])
def test_what_nobody_foresaw_is_listed_with_its_traceback(launcher, tmp_path):
    (tmp_path / "runs/x/0/0").mkdir(parents=True)
    (tmp_path / "runs/x/0/0/tensorboard").write_text("a file, where a folder must be")
    _, error = dgavg(tmp_path, *launcher, "-m", *TWO, "logger=tensorboard", status=2)
    (reason,) = [x for x in error.splitlines() if x.startswith("dgavg: FileExistsError: ")]
    assert "  again: dgavg trainer=basic " in error
    path = Path(re.search(r"\(traceback in (.*)\)", reason)[1])
    assert path.is_relative_to(tmp_path / "runs/.sweeps")
    text = path.read_text()
    assert text.startswith("Traceback")
    assert "tensorboard" in text
    assert list(records(tmp_path / "runs/x")) == ["45/0"]
    assert "45" in dgavg(tmp_path, "report", str(tmp_path / "runs"), runs=False)[0]


def test_a_mistake_of_a_chain_is_told_once_and_the_others_run(tmp_path):
    words = ["-m", "trainer=ema_basic,basic", *TWO[1:-1], "stopping.candidate=ema"]
    out, error = dgavg(tmp_path, *JOBLIB, *words, status=2)
    first, *_, reason, again, last = error.splitlines()
    assert first == "2 runs on joblib, each a job of its own"
    assert reason.startswith("dgavg: no candidate 'ema' in the chain 'basic'")
    whole = f"  again: dgavg trainer=basic 'holdout=[0,45]' seed=0 {' '.join(SMALL)}"
    assert again == f"{whole} stopping.candidate=ema runs={tmp_path}/runs"
    assert last.startswith("dgavg: 1 failed")
    assert re.search(r"^ema_basic +live +\d", out, re.MULTILINE)


@pytest.mark.parametrize("launcher", [[], JOBLIB], ids=["basic", "joblib"])
def test_a_run_that_another_process_trains_is_left_to_it_and_waited_for(launcher, tmp_path):
    folder = tmp_path / "runs/x/0/0"
    folder.mkdir(parents=True)
    lock = FileLock(folder / ".lock", thread_local=False)
    lock.acquire()
    threading.Timer(4, lock.release).start()
    _, error = dgavg(tmp_path, *launcher, "-m", *TWO)
    said = f"another process is training in {folder}: left to it for now"
    lines = error.splitlines()
    assert lines.count(said) == 1
    (first,) = [i for i, line in enumerate(lines) if "hold out 0," in line]
    (other,) = [i for i, line in enumerate(lines) if "hold out 45," in line]
    assert lines.index(said) < first
    assert other < first
    assert list(records(tmp_path / "runs/x")) == ["0/0", "45/0"]


def end(process, how):
    """Send a signal to a process and to those it started; wait for it."""
    os.killpg(process.pid, how)
    process.communicate(timeout=60)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_sweep_goes_on_and_ends_with_the_same_records(seed, sequential, tmp_path):
    runs, table = sequential
    process = start(tmp_path, *JOBLIB, *SWEEP)
    while process.poll() is None and not list(tmp_path.rglob("done")):
        time.sleep(0.01)
    time.sleep(random.Random(seed).uniform(0, 0.3))
    end(process, signal.SIGKILL)
    before = len(records(tmp_path / "runs"))
    assert 0 < before < 12
    out, error = dgavg(tmp_path, *JOBLIB, *SWEEP)
    assert out == table
    assert error.count("(done before)") == before
    assert records(tmp_path / "runs") == records(runs)
    assert weights(tmp_path / "runs") == weights(runs)


@pytest.mark.slow
def test_two_starts_of_one_sweep_share_the_work(sequential, tmp_path):
    runs, table = sequential
    both = [start(tmp_path, *JOBLIB, *SWEEP) for _ in range(2)]
    ends = [process.communicate(timeout=300) for process in both]
    assert [p.returncode for p in both] == [0, 0], ends
    assert [out for out, _ in ends] == [table, table]
    assert records(tmp_path / "runs") == records(runs)
    lines = "".join(error for _, error in ends)
    assert len(re.findall(r"\(\d+\.\d s\)", lines)) == 12, lines  # each is trained once


@pytest.mark.slow
def test_ctrl_c_is_one_line_and_leaves_no_process(tmp_path):
    long = ["protocol.steps=1000000", "protocol.eval_every=50", "model.width=8", "name=x"]
    words = ["-m", "trainer=basic", "holdout=[0,45]", "seed=0", *long]
    process = start(tmp_path, *JOBLIB, *words)
    while process.poll() is None and len(list(tmp_path.rglob("checkpoint.pt"))) < 2:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert error.splitlines()[1:] == [
        "dgavg: interrupted; the same command goes on from the last checkpoint"
    ]
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and _alive(process.pid):
        time.sleep(0.1)
    assert not _alive(process.pid)


def _alive(group):
    """Whether a process of the group still runs."""
    found = subprocess.run(
        ["ps", "-e", "-o", "pgid=,stat=,args="], capture_output=True, text=True, check=True
    )
    lines = [line.split(maxsplit=2) for line in found.stdout.splitlines()]
    return [x for x in lines if int(x[0]) == group and not x[1].startswith("Z")]
