"""Soups of runs whose records say more of their data than the loader has settings for."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from soups import only, record_of

CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
DOMAINS = ("art_painting", "cartoon", "photo", "sketch")


@pytest.fixture
def lists(tmp_path):
    """PACS in small, with official lists that hold every fourth image out."""
    rng = np.random.default_rng(0)
    for domain in DOMAINS:
        found = {"train": "", "crossval": "", "test": ""}
        for label, name in enumerate(CLASSES, 1):
            folder = tmp_path / "PACS" / domain / name
            folder.mkdir(parents=True)
            for i in range(8):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
                line = f"{domain}/{name}/{i}.png {label}\n"
                found["test"] += line
                found["train" if i % 4 else "crossval"] += line
        (tmp_path / "PACS/splits").mkdir(exist_ok=True)
        for part, text in found.items():
            (tmp_path / f"PACS/splits/{domain}_{part}_kfold.txt").write_text(text)


def test_runs_with_official_lists_make_a_soup_on_the_same_lists(dgavg, lists, tmp_path):
    place = "data.root=PACS data.check=false"
    dgavg(
        f"-m trainer=basic optimizer.lr=0.01,0.02 data=pacs {place} data.size=8 model.width=8 "
        "protocol.splits=official protocol.test_split=all protocol.steps=20 "
        "protocol.eval_every=20 seeds=[0] holdout=[sketch] device=cpu"
    )
    dgavg(f"soup runs runs=soups {place}")
    record = record_of(only(tmp_path / "soups"), "sketch", 0)
    runs = [record_of(run, "sketch", 0) for run in (tmp_path / "runs").iterdir()]
    assert {run["data"]["splits"] for run in runs} == {record["data"]["splits"]}
    assert record["candidates"]["soup"]["splits"]["sketch/in"]["n"] == 7 * 8
