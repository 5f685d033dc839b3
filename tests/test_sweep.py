"""Sweeps on joblib's processes: the same numbers, failures, kills, two at once."""

from __future__ import annotations

import os
import random
import re
import shlex
import signal
import time

import pytest
from sweeps import JOBLIB, SMALL, SWEEP, dgavg, records, start, weights

pytest.importorskip("hydra_plugins.hydra_joblib_launcher")


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
    assert {x for line in lines if (x := re.search(r" (\w+), hold out (\d+), seed (\d):", line)[0])}
    assert records(tmp_path / "runs") == records(runs)
    assert len(records(runs)) == 12
    assert weights(tmp_path / "runs") == weights(runs)
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == sorted(
        p.name for p in runs.iterdir()
    )  # no report is left

    out, error = dgavg(tmp_path, *JOBLIB, *SWEEP)
    assert out == table
    assert error.count("(done before)") == 12


def test_a_failing_run_stops_no_other_and_its_command_repeats_it(tmp_path):
    words = [*JOBLIB, "-m", "trainer=basic", "holdout=[0,45]", "seed=0", *SMALL, "name=x"]
    blocked = tmp_path / "runs/x/45/0"
    blocked.mkdir(parents=True)
    (blocked / "config.yaml").write_text("garbage")
    out, error = dgavg(tmp_path, *words, status=2)
    assert re.search(r"^basic +live +\d", out, re.MULTILINE)
    why = "runs/x/45/0/config.yaml is damaged or not of dgavg; delete runs/x/45/0 to train that "
    *_, reason, again, last = error.splitlines()
    assert reason == f"dgavg: {why}run anew"
    assert last == "dgavg: 1 failed; the same command tries again what is not done"
    mark, _, line = again.partition(": ")
    assert mark == "  again"
    _, *again = shlex.split(line)
    assert again == ["trainer=basic", *SMALL, "name=x", "holdout=[45]", "seed=0"]
    assert dgavg(tmp_path, *again, status=2)[1] == f"dgavg: {why}run anew\n"
    (blocked / "config.yaml").unlink()
    dgavg(tmp_path, *again)
    assert list(records(tmp_path / "runs/x")) == ["0/0", "45/0"]
    assert not (tmp_path / "runs/.sweeps").exists()


def test_a_bug_is_listed_with_its_traceback(tmp_path):
    # a folder where the records should be is what no message foresees
    (tmp_path / "runs/x/45/0/records.jsonl.part").mkdir(parents=True)
    (tmp_path / "sitecustomize.py").write_text("")
    words = [*JOBLIB, "-m", "trainer=basic", "holdout=[0,45]", "seed=0", *SMALL, "name=x"]
    _, error = dgavg(tmp_path, *words, status=2)
    assert "runs/x/45/0/records.jsonl cannot be written" in error


def test_mistakes_are_told_once_before_anything_starts(tmp_path):
    words = ["-m", "trainer=irm_basic,basic", "holdout=[0,45]", "seed=0", *SMALL]
    out, error = dgavg(tmp_path, *JOBLIB, *words, status=2)
    assert error.splitlines()[0] == "2 runs on joblib, each a job of its own"
    *_, reason, again, last = error.splitlines()
    assert reason.startswith("dgavg: trainer.irm.anneal=500 is past the end")
    assert again == f"  again: dgavg trainer=irm_basic 'holdout=[0,45]' seed=0 {' '.join(SMALL)}"
    assert last.startswith("dgavg: 1 failed")
    assert "basic" in out


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


def test_two_starts_of_one_sweep_share_the_work(sequential, tmp_path):
    runs, table = sequential
    both = [start(tmp_path, *JOBLIB, *SWEEP) for _ in range(2)]
    ends = [process.communicate(timeout=300) for process in both]
    assert [p.returncode for p in both] == [0, 0], ends
    assert [out for out, _ in ends] == [table, table]
    assert records(tmp_path / "runs") == records(runs)
    lines = "".join(error for _, error in ends)
    assert len(re.findall(r"\(\d+\.\d s\)", lines)) == 12, lines  # each is trained once


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
    time.sleep(1)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
