"""Real processes: interrupts, two at once, mistakes, a terminal, TensorBoard."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import time

import pytest

LONG = [
    *("trainer=ema_basic", "model.width=16", "protocol.steps=1000000", "protocol.eval_every=50"),
    *("holdout=[0]", "seeds=[0]", "name=x"),
]


@pytest.fixture
def training(tmp_path, start):
    """A process that trains and has written a checkpoint."""
    process = start(tmp_path, *LONG)
    checkpoint = tmp_path / "runs/x/0/0/checkpoint.pt"
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.02)
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_in_a_folder_waits_and_ctrl_c_hands_the_run_over(
    training, tmp_path, start
):
    second = start(tmp_path, *LONG)
    said = second.stderr.readline()
    assert said == "another process is training in runs/x/0/0: left to it for now\n"
    assert training.poll() is None
    training.send_signal(signal.SIGINT)
    out, error = training.communicate(timeout=300)
    assert (training.returncode, out) == (130, "")
    assert error == "dgavg: interrupted; the same command goes on from the last checkpoint\n"
    saved = (tmp_path / "runs/x/0/0/checkpoint.pt").stat().st_mtime_ns
    while (tmp_path / "runs/x/0/0/checkpoint.pt").stat().st_mtime_ns == saved:
        assert second.poll() is None
        time.sleep(0.02)
    assert not (tmp_path / "runs/x/0/0/done").exists()
    second.kill()
    second.communicate()


def test_debug_shows_the_traceback_of_a_mistake(tmp_path, start, monkeypatch):
    monkeypatch.setenv("DGAVG_DEBUG", "1")
    process = start(tmp_path, "trainer=ema_ma_basic")
    _, error = process.communicate()
    assert process.returncode not in (0, 2)
    assert "Traceback" in error
    assert error.rstrip().endswith("so it must come first: write ma_ema_basic")
    assert not any(tmp_path.iterdir())


def test_a_terminal_shows_fold_rate_loss_and_time_left_and_then_the_table(tmp_path, start):
    ours, theirs = pty.openpty()
    words = [*LONG[:2], "protocol.steps=1200", "protocol.eval_every=600", *LONG[4:]]
    process = start(tmp_path, *words, "holdout=[0,45]", stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    while select.select([ours], [], [], 60)[0]:
        try:
            shown += os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert re.search(
        r"ema_basic hold out 45, seed 0 \[2/2\] .*%\s+\d+ steps/s  loss \d\.\d{3}  "
        r"\d:\d\d:\d\d left",
        text,
    )
    assert "against live" in text.splitlines()[-5]
