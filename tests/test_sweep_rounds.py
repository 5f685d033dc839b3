"""Launchers that give up because a process of theirs died."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from filelock import FileLock
from sweeps import JOBLIB, dgavg, records

from dgavg import UserError
from dgavg.benchmark.folder import is_free
from dgavg.sweep.reports import Failed, Report, failures
from dgavg.sweep.rounds import rounds


def launcher(folder, deadly, log):
    """Jobs two at a time; a deadly one takes the other with it and stops the launcher."""

    def launch(jobs, initial_job_idx):
        log.append([name for (name,) in jobs])
        for at in range(0, len(jobs), 2):
            both = list(enumerate(jobs))[at : at + 2]
            dead = any(name in deadly for _, (name,) in both)
            for k, overrides in both:
                report = Report(
                    list(overrides), runs=[overrides[0]], lines=overrides, ended=not dead
                )
                report.write(folder, initial_job_idx + k)
            if dead:
                raise RuntimeError("a worker was killed\nin some way")

    return launch


def test_a_job_that_kills_its_process_stops_no_other(tmp_path):
    log = []
    jobs = [[name] for name in "abcdef"]
    found = rounds(launcher(tmp_path, {"d"}, log), jobs, tmp_path, "two")
    assert [report.overrides for report in found] == jobs
    assert [report.overrides for report in found if report.failed] == [["d"]]
    assert found[3].failed[0].message == (
        "the process of a job was killed (RuntimeError: a worker was killed)"
    )
    assert log == [list("abcdef"), ["c"], ["d"], ["e", "f"]]  # suspects one by one


def test_a_job_that_outlives_its_launcher_is_told_once(tmp_path, capsys):
    """On a cluster the other jobs go on: they end, and are launched again."""
    log = []

    def launch(jobs, initial_job_idx):
        first = not log
        log.append([name for (name,) in jobs])
        for k, (name,) in enumerate(jobs):
            line = f"{name} trained" if first else f"{name} (done before)"
            Report([name], [name], lines=[line], ended=not first).write(
                tmp_path, initial_job_idx + k
            )
        if first:
            ending = Report(["b"], ["b"], lines=["b trained"], ended=True)
            threading.Timer(0.2, lambda: ending.write(tmp_path, 1)).start()
            raise RuntimeError("a was killed")
        time.sleep(1.0)  # until the show has looked

    rounds(launch, [["a"], ["b"]], tmp_path, "cluster")
    said = capsys.readouterr().err.splitlines()
    assert log == [["a", "b"], ["a"], ["b"]]
    assert [line[:5] for line in said[1:]] == ["[1/2]", "[2/2]"]
    assert sum("b trained" in line for line in said) == 1


def test_a_run_of_another_process_is_looked_at_again_once_it_has_ended(tmp_path):
    log, run = [], tmp_path / "run"
    run.mkdir()
    lock = FileLock(run / ".lock", thread_local=False)
    lock.acquire()

    def launch(jobs, initial_job_idx):
        log.extend(jobs)
        failed = [] if is_free(run) else [Failed(["a"], "busy", busy=str(run))]
        Report(["a"], failed=failed, lines=["trained"], ended=True).write(tmp_path, initial_job_idx)

    threading.Timer(0.7, lock.release).start()
    (found,) = rounds(launch, [["a"]], tmp_path, "one")
    assert not found.failed
    assert log == [["a"], ["a"]]


def test_what_failed_for_one_reason_is_told_once_with_every_command():
    why = "trainer.irm.anneal=500 is past the end"
    reports = [Report([], failed=[Failed([f"trainer={name}"], why)]) for name in ("a", "b")]
    assert list(failures(reports, ["--config-dir", "x"])) == [
        f"dgavg: {why}",
        "  again: dgavg --config-dir x trainer=a",
        "  again: dgavg --config-dir x trainer=b",
    ]


def test_a_launcher_that_launches_nothing_is_one_line(tmp_path):
    def launch(jobs, initial_job_idx):
        raise RuntimeError("no queue here")

    with pytest.raises(UserError, match=r"^hydra/launcher=two: RuntimeError: no queue here$"):
        rounds(launch, [["a"], ["b"]], tmp_path, "two")


def test_a_launcher_that_fails_later_is_listed(tmp_path):
    log = []

    def launch(jobs, initial_job_idx):
        if log:
            raise RuntimeError("the queue is gone")
        launcher(tmp_path, {"b"}, log)(jobs, initial_job_idx)

    found = rounds(launch, [["a"], ["b"], ["c"]], tmp_path, "two")
    assert [bool(report.failed) for report in found] == [True] * 3
    assert found[2].failed[0].message.endswith("(RuntimeError: the queue is gone)")


def test_a_job_that_leaves_no_report_is_listed(tmp_path):
    found = rounds(lambda jobs, initial_job_idx: None, [["a"]], tmp_path, "two")
    assert found[0].failed[0].message == "the process of a job was killed"


@pytest.mark.slow
def test_a_process_that_is_killed_once_costs_no_run(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")

    def kill():
        while len(list(tmp_path.rglob("checkpoint.pt"))) < 2:
            time.sleep(0.05)
        os.kill(_workers()[0], signal.SIGKILL)

    words = ["-m", "trainer=basic", "holdout=[0,45]", "seed=0,1", "name=x", "model.width=8"]
    thread = threading.Thread(target=kill)
    thread.start()
    dgavg(tmp_path, *JOBLIB, *words, "protocol.steps=4000", "protocol.eval_every=500")
    thread.join()
    assert len(records(tmp_path / "runs/x")) == 4
    assert not (tmp_path / "runs/.sweeps").exists()


def _workers():
    """The processes of joblib that this one started."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/cmdline") as line, open(f"/proc/{name}/stat") as stat:
                mine = int(stat.read().rpartition(")")[2].split()[1]) == os.getpid()
                found += [int(name)] if mine and "LokyProcess" in line.read() else []
        except (FileNotFoundError, ProcessLookupError):
            pass
    return found
