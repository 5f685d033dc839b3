"""Data are loaded again: from another place, never others, and the held-out domain decides nothing.

A folder of pictures stands in for data that can be moved and spoilt.
"""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from soups import held_out_accuracy, only, record_of

SMALL = [
    *("data=folder", "data.size=8", "data.workers=1", "model=mlp", "model.width=8", "device=cpu"),
    *("protocol.steps=30", "protocol.eval_every=30", "seeds=[0]", "holdout=[c]"),
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """`good/` and `spoilt/`: three domains of two classes; in the latter the domain c is noise."""
    top, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for domain in "abc":
        for label in (0, 1):
            for i in range(20):
                image = rng.integers(0, 256, (8, 8, 3))
                image[:, :, label] //= 3  # less of one colour
                for tree in ("good", "spoilt"):
                    noise = rng.integers(0, 256, (8, 8, 3))
                    shown = noise if (tree, domain) == ("spoilt", "c") else image
                    path = top / tree / domain / "xy"[label] / f"{i}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(shown.astype(np.uint8)).save(path)
    return top


@pytest.fixture
def train_on(dgavg):
    def run(tree, runs):
        for rate in (0.003, 0.01, 0.03):
            words = f"trainer=basic optimizer.lr={rate} name=lr{rate} data.root={tree} runs={runs}"
            dgavg(words, *SMALL)

    return run


@pytest.mark.parametrize("rule", ["greedy", "restricted", "learned"])
def test_noise_in_the_held_out_domain_changes_no_soup(rule, dgavg, train_on, pictures, tmp_path):
    records, weights = {}, {}
    for tree in ("good", "spoilt"):
        train_on(pictures / tree, tree)
        dgavg(f"soup {tree} --rule {rule} data.root={pictures / tree} runs=soups-{tree}")
        folder = only(tmp_path / f"soups-{tree}")
        records[tree] = record_of(folder, "c", 0)
        weights[tree] = load_file(folder / "c/0/weights/soup.safetensors")
    chosen = {
        tree: [
            {k: v for k, v in m.items() if k not in ("settings", "splits")} for m in r["members"]
        ]
        for tree, r in records.items()
    }
    assert chosen["good"] == chosen["spoilt"]
    good, spoilt = weights.values()
    assert good.keys() == spoilt.keys()
    assert all(good[k].equal(spoilt[k]) for k in good)
    good, spoilt = (held_out_accuracy(r, "soup") for r in records.values())
    assert good != spoilt  # noise it was


def test_data_may_have_moved_but_must_be_the_same(dgavg, train_on, pictures, tmp_path):
    train_on(pictures / "good", "runs")
    _, error = dgavg("soup runs runs=soups", status=2)
    assert error == "dgavg: data.root is missing: write data.root=...\n"
    _, error = dgavg(f"soup runs runs=soups data.root={pictures / 'spoilt'}", status=2)
    assert error.startswith(
        "dgavg: data set 'folder' is not the one the runs were trained on (content "
    )
    assert error.endswith("): set data.root=FOLDER to that\n")
    assert not (tmp_path / "soups").exists()
    shutil.copytree(pictures / "good", tmp_path / "moved")
    dgavg("soup runs runs=soups data.root=moved data.workers=2")
    assert record_of(only(tmp_path / "soups"), "c", 0)["data"]["size"] == 8
    _, error = dgavg("soup runs runs=soups data.root=moved data.size=16", status=2)
    assert error == (
        "dgavg: data.size is as it was in the runs; here may be set: device, precision, threads, "
        "eval_batch_size, runs, name, data.root, data.workers, data.cache\n"
    )
