"""A soup that was killed while it was written is made again whole."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file
from soups import only

TRAIN = [
    *("trainer=ema_basic", "model.width=8", "protocol.steps=20", "protocol.eval_every=20"),
    *("holdout=[0]", "seeds=[0]", "device=cpu", "data.angles=[0,30]", "data.size=8"),
]
SOUP = ["soup", "../runs", "runs=soups", "--rule", "greedy"]
MOMENTS = {
    "while settings are written": ["write", "config.yaml", 1],
    "while weights are written": ["write", "soup.safetensors", 1],
    "after the weights": ["renamed", "soup.safetensors", 1],
    "while the record is written": ["write", "records.jsonl", 1],
    "after the record": ["renamed", "records.jsonl", 1],
    "while `done` is written": ["write", "done", 1],
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory, run_and_kill):
    """By moment the folder as killed, and the one where the same command came again."""
    top = tmp_path_factory.mktemp("killed")
    runs = [(top, [*TRAIN, f"optimizer.lr={rate}"], None) for rate in (0.01, 0.03)]
    folders = {moment: top / str(i) for i, moment in enumerate(["whole", *MOMENTS])}
    jobs = [(folders[moment], SOUP, at) for moment, at in {"whole": None, **MOMENTS}.items()]
    ends, errors = run_and_kill([*runs, *jobs])
    assert ends == [0, 0, 0] + [-9] * len(MOMENTS), errors
    for moment in MOMENTS:
        shutil.copytree(folders[moment] / "soups", top / f"{moment} as killed")
    again = [(folder, SOUP, None) for folder in folders.values()]
    ends, errors = run_and_kill([runs[0], *again])
    assert ends == [0] * (2 + len(MOMENTS)), errors
    return {
        moment: (top / f"{moment} as killed", folder / "soups")
        for moment, folder in folders.items()
    }


def content(soups):
    run = only(soups) / "0/0"
    record = json.loads((run / "records.jsonl").read_text())
    del record["timing"]
    files = sorted(str(p.relative_to(soups)) for p in soups.rglob("*") if p.is_file())
    return record, (run / "weights/soup.safetensors").read_bytes(), files


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_soup_is_not_done_and_ends_as_one_that_was_not(moment, killed):
    before, after = killed[moment]
    run = only(before) / "0/0"
    assert not (run / "done").exists()
    for path in run.rglob("*.safetensors"):
        assert load_file(path)
    for path in run.rglob("records.jsonl"):
        assert json.loads(path.read_text())["chain"] == "greedy soup of live"
    assert content(after) == content(killed["whole"][1])
