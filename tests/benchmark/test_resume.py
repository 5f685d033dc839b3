"""A run that was killed at any moment ends as one that was not, to the bit."""

from __future__ import annotations

import json
import random
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
    "trainer.irm.anneal=50",
    "model.width=24",
    "model.dropout=0.1",
    "protocol.steps=80",
    "protocol.eval_every=20",
    "holdout=[30]",
    "seeds=[1]",
]
MOMENTS = {
    "before the first checkpoint": ["step", 7],
    "in a step": ["step", 45],
    "at the step where irm's weight jumps": ["step", 49],
    "in an evaluation": ["evaluation", 3],
    "while the settings are written": ["write", "config.yaml", 1],
    "while records are written": ["write", "records.jsonl", 3],
    "between records and checkpoint": ["renamed", "records.jsonl", 4],
    "while weights are written": ["write", "swa.safetensors", 2],
    "while the first checkpoint is written": ["write", "checkpoint.pt", 1],
    "while a later checkpoint is written": ["write", "checkpoint.pt", 3],
    "after the last checkpoint": ["renamed", "checkpoint.pt", 4],
    "while `done` is written": ["write", "done", 1],
}
LONGER = ["protocol.steps=300"]
SEVERAL = [["step", 40], ["write", "checkpoint.pt", 1], ["evaluation", 2], ["step", 70]]


@pytest.fixture(scope="module")
def killed(tmp_path_factory, run_and_kill):
    """Every run by its moment, the uninterrupted one by None; and a copy made after the kill."""
    top = tmp_path_factory.mktemp("killed")
    folders = {moment: top / str(i) for i, moment in enumerate([None, "several", *MOMENTS])}
    longer = (top / "longer", [*CHAIN, *LONGER], None)
    jobs = [(folders[moment], CHAIN, at) for moment, at in MOMENTS.items()]
    ends, _ = run_and_kill(jobs)
    assert ends == [-9] * len(ends)  # each was really killed where it was meant to be
    for moment in MOMENTS:
        shutil.copytree(folders[moment], top / f"{moment} as killed")
        folders[f"{moment} as killed"] = top / f"{moment} as killed"
    several = [(folders["several"], CHAIN, at) for at in SEVERAL]
    rest = [(folder, CHAIN, None) for key, folder in folders.items() if "killed" not in str(key)]
    ends, errors = run_and_kill([*several, *rest, longer])
    assert ends == [-9] * len(several) + [0] * len(rest) + [0], errors
    return {**folders, "longer": top / "longer"}


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
    assert [r["step"] for r in records_of(only_run(killed[None]))] == [20, 40, 60, 80]


def test_a_process_killed_from_outside_goes_on_exactly(
    tmp_path, start, killed, only_run, content_of
):
    process = start(tmp_path, *CHAIN, *LONGER)
    while process.poll() is None and not list(tmp_path.rglob("checkpoint.pt")):
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.2))
    process.kill()
    process.communicate()
    assert process.returncode == -9
    assert not (only_run(tmp_path) / "done").exists()
    process = start(tmp_path, *CHAIN, *LONGER)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert content_of(only_run(tmp_path)) == content_of(only_run(killed["longer"]))
