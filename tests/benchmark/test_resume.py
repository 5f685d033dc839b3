"""A run that was killed at any moment ends as one that was not, to the bit."""

from __future__ import annotations

import json
import shutil
import time

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

CHAIN = [
    "trainer=ma_sma_ema_swa_irm_mixup_sam_basic",
    "trainer.sma.start=10",
    "trainer.swa.start=0.3",
    "trainer.irm.anneal=60",
    "model.width=24",
    "model.dropout=0.1",
    "protocol.steps=120",
    "protocol.eval_every=25",
    "holdout=[30]",
    "seeds=[1]",
]
MOMENTS = {
    "before the first checkpoint": ["step", 7],
    "in a step": ["step", 62],
    "at the step where irm's weight jumps": ["step", 59],
    "in the last step": ["step", 119],
    "in the first evaluation": ["evaluation", 1],
    "in a later evaluation": ["evaluation", 4],
    "while the settings are written": ["write", "config.yaml", 1],
    "while records are written": ["write", "records.jsonl", 3],
    "between records and checkpoint": ["renamed", "records.jsonl", 4],
    "while weights are written": ["write", "swa.safetensors", 2],
    "between weights and records": ["renamed", "live.safetensors", 2],
    "while the first checkpoint is written": ["write", "checkpoint.pt", 1],
    "while a later checkpoint is written": ["write", "checkpoint.pt", 3],
    "after a checkpoint": ["renamed", "checkpoint.pt", 2],
    "after the last checkpoint": ["renamed", "checkpoint.pt", 5],
    "while `done` is written": ["write", "done", 1],
}
SEVERAL = [["step", 40], ["write", "checkpoint.pt", 1], ["evaluation", 2], ["step", 110]]


@pytest.fixture(scope="module")
def killed(tmp_path_factory, run_and_kill):
    """Every run by its moment, the uninterrupted one by None; and a copy made after the kill."""
    top = tmp_path_factory.mktemp("killed")
    folders = {moment: top / str(i) for i, moment in enumerate([None, "several", *MOMENTS])}
    jobs = [(folders[moment], CHAIN, at) for moment, at in MOMENTS.items()]
    ends, _ = run_and_kill(jobs)
    assert ends == [-9] * len(ends)  # each was really killed where it was meant to be
    for moment in MOMENTS:
        shutil.copytree(folders[moment], top / f"{moment} as killed")
        folders[f"{moment} as killed"] = top / f"{moment} as killed"
    several = [(folders["several"], CHAIN, at) for at in SEVERAL]
    rest = [(folder, CHAIN, None) for key, folder in folders.items() if "killed" not in str(key)]
    ends, errors = run_and_kill([*several, *rest])
    assert ends == [-9] * len(several) + [0] * len(rest), errors
    return folders


@pytest.mark.parametrize("moment", [*MOMENTS, "several"])
def test_a_killed_run_ends_as_an_uninterrupted_one(moment, killed, only_run, content_of):
    found, wanted = (content_of(only_run(killed[m])) for m in (moment, None))
    assert found.keys() == wanted.keys()
    for part in wanted:
        assert found[part] == wanted[part], part


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_leaves_no_half_file_under_its_real_name(moment, killed):
    folder = killed[f"{moment} as killed"]
    for path in folder.rglob("checkpoint.pt"):
        assert "run" in torch.load(path, weights_only=True)
    for path in folder.rglob("*.safetensors"):
        assert load_file(path)
    for path in folder.rglob("records.jsonl"):
        assert all(json.loads(line)["step"] for line in path.read_text().splitlines())
    for path in folder.rglob("config.yaml"):
        assert OmegaConf.load(path).seed == 1
    for path in folder.rglob("done"):
        assert path.read_text() == "done"
    assert not list(folder.rglob("done")) or moment == "while `done` is written"


def test_the_uninterrupted_run_has_each_record_once(killed, only_run, records_of):
    assert [r["step"] for r in records_of(only_run(killed[None]))] == [25, 50, 75, 100, 120]


def test_a_process_killed_from_outside_goes_on_exactly(
    tmp_path, start, run_and_kill, only_run, content_of
):
    words = [*CHAIN, "protocol.steps=400"]
    (tmp_path / "killed").mkdir()
    for _ in range(2):
        process = start(tmp_path / "killed", *words)
        known = len(list(tmp_path.rglob("records.jsonl")))
        before = only_run(tmp_path).stat().st_mtime_ns if known else 0
        while process.poll() is None:
            if (
                list(tmp_path.rglob("checkpoint.pt"))
                and only_run(tmp_path).stat().st_mtime_ns > before
            ):
                time.sleep(0.15)
                break
            time.sleep(0.01)
        process.kill()
        process.communicate()
        assert process.returncode == -9
    assert not (only_run(tmp_path) / "done").exists()
    process = start(tmp_path / "killed", *words)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    run_and_kill([(tmp_path / "whole", words, None)])
    found, wanted = (content_of(only_run(tmp_path / name)) for name in ("killed", "whole"))
    assert found == wanted
