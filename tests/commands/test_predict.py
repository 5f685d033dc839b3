"""`dgavg predict`."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from dgavg import leave_one_domain_out
from dgavg.commands.predict import predict
from dgavg.errors import UserError


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of two runs of a tiny model on digits, of two seeds."""
    home = tmp_path_factory.mktemp("runs")
    small = {"protocol.steps": 4, "protocol.eval_every": 2, "model.width": 8, "device": "cpu"}
    leave_one_domain_out(
        "ema_basic",
        seeds=[0, 1],
        holdout=[45],
        runs=home,
        name="tiny",
        quiet=True,
        settings=small,
    )
    return home / "tiny" / "45" / "0", home / "tiny" / "45" / "1"


@pytest.fixture
def images(tmp_path):
    """Six images in folders of two classes, one of them truncated."""
    random = np.random.default_rng(0)
    for name in ("3", "8"):
        (tmp_path / "new" / name).mkdir(parents=True)
        for i in range(3):
            pixels = random.integers(0, 256, (20, 20), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "new" / name / f"{i}.png")
    bad = tmp_path / "new" / "8" / "1.png"
    bad.write_bytes(bad.read_bytes()[:100])
    return tmp_path / "new"


def test_a_folder_is_scored_into_a_csv(runs, images, tmp_path, capsys):
    out = tmp_path / "out.csv"
    predict([str(runs[0]), str(images), "--out", str(out), "--candidate", "ema", "--device", "cpu"])
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file", "class", *"0123456789"]
    assert [row["file"] for row in rows] == ["3/0.png", "3/1.png", "3/2.png", "8/0.png", "8/2.png"]
    right = sum(row["file"][0] == row["class"] for row in rows)
    printed = capsys.readouterr()
    assert f"{out}: 5 images, 1 left out, accuracy {20 * right:.2f} % on the" in printed.out
    assert "ema_basic, hold out 45, seed 0: ema of step" in printed.err
    (line,) = [line for line in printed.err.splitlines() if "left out" in line]
    assert line.startswith("dgavg: left out 8/1.png: ")


def test_without_folders_named_like_classes_there_is_no_accuracy(runs, images, tmp_path, capsys):
    out = tmp_path / "out.csv"
    predict([str(runs[0]), str(images / "3"), "--out", str(out)])
    assert capsys.readouterr().out == f"{out}: 3 images\n"


def test_where_only_some_lie_in_such_folders_it_says_how_many(runs, images, tmp_path, capsys):
    (images / "3" / "0.png").rename(images / "loose.png")
    predict([str(runs[0]), str(images), "--out", str(tmp_path / "out.csv")])
    assert "on the 4 images in folders named like classes" in capsys.readouterr().out


def test_several_runs_are_an_ensemble(runs, images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    predict([*map(str, runs), str(images / "3")])
    text = capsys.readouterr()
    assert text.out.startswith("predictions.csv: 3 images")
    assert [line.split(":")[1] for line in text.err.splitlines()] == [
        " ema_basic, hold out 45, seed 0",
        " ema_basic, hold out 45, seed 1",
    ]


def test_a_model_that_looks_at_the_batch_says_so_once(images, tmp_path, capsys):
    small = {"protocol.steps": 2, "protocol.eval_every": 2, "model.width": 8}
    leave_one_domain_out(
        "arm_basic",
        seeds=[0],
        holdout=[45],
        runs=tmp_path,
        name="arm",
        quiet=True,
        settings=small,
    )
    both = 2 * [str(tmp_path / "arm" / "45" / "0")]
    predict([*both, str(images), "--out", str(tmp_path / "out.csv"), "--on-bad-image", "skip"])
    assert capsys.readouterr().err.count("32 at a time, in the order of the files") == 1


def test_mistakes_are_one_line(runs, images, tmp_path):
    run = str(runs[0])
    for words, part in (
        ([run], "dgavg predict RUN [RUN ...] FOLDER"),
        ([run, str(images), "--on-bad-image", "stop"], "skip"),
        ([run, str(images), "--candidate", "sma"], "live, ema"),
        ([run, str(images), "--device", "gpu"], "cuda"),
        ([run, str(images), "--batch-size", "0"], "at least 1"),
        ([run, str(images), "--on-bad-image", "error"], "8/1.png cannot be read"),
        ([run, str(tmp_path / "nowhere")], "no folder or image"),
        ([str(images), str(images)], "is no run"),
    ):
        with pytest.raises(UserError) as caught:
            predict([*words, "--out", str(tmp_path / "out.csv")])
        assert part in str(caught.value)
        assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_killed_command_leaves_no_half_file(runs, images, tmp_path):
    many = tmp_path / "many"
    many.mkdir()
    for i in range(3000):
        os.link(images / "3" / "0.png", many / f"{i}.png")
    out = tmp_path / "out.csv"
    code = "import sys; from dgavg.commands.predict import predict; predict(sys.argv[1:])"
    words = [str(runs[0]), str(many), "--out", str(out), "--batch-size", "1", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    part, end = tmp_path / "out.csv.part", time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > 0):  # rows are on their way
        assert time.monotonic() < end
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    predict(words)
    assert len(out.read_text().splitlines()) == 3001
    assert not part.exists()
