"""Runs for the tests of what is done with them: tiny, real, trained once."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dgavg import leave_one_domain_out

SIZE = 40  # pixels of the images, 32 of what is trained on
CLASSES = ("blue, sky", "grass")
DOMAINS = ("art", "photo", "sketch")


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """A folder tree domain/class/image: blueish and greenish noise, sizes of their own."""
    root = tmp_path_factory.mktemp("tree")
    random = np.random.default_rng(0)
    for d, domain in enumerate(DOMAINS):
        for c, name in enumerate(CLASSES):
            (root / domain / name).mkdir(parents=True)
            for i in range(12):
                pixels = random.integers(0, 160, (SIZE + 3 * d, SIZE - i, 3), dtype=np.uint8)
                pixels[:, :, 2 - c] += 60
                Image.fromarray(pixels).save(root / domain / name / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def train(tmp_path_factory, tree):
    """`train(chain, **more)`: the folder of one tiny run, trained once."""
    made = {}

    def of(chain="ema_basic", *, model="mlp", data="digits_rotated", holdout=None, **settings):
        key = repr((chain, model, data, holdout, sorted(settings.items())))
        if key not in made:
            home = tmp_path_factory.mktemp("runs")
            small = {"model.width": 16} if model == "mlp" else {}
            place = {"data.root": str(tree), "data.size": 32} if data == "folder" else {}
            defaults = {
                "protocol.steps": 8,
                "protocol.eval_every": 2,
                "protocol.test_split": "all",
                "evaluate": "all",
                "optimizer.lr": 0.003,
                "device": "cpu",
                **small,
                **place,
            }
            leave_one_domain_out(
                chain,
                data,
                model=model,
                seeds=[0],
                holdout=[holdout or ("sketch" if data == "folder" else 45)],
                runs=home,
                name="tiny",
                quiet=True,
                settings=defaults | {k.replace("__", "."): v for k, v in settings.items()},
            )
            (config,) = home.rglob("config.yaml")
            made[key] = config.parent
        return made[key]

    return of


@pytest.fixture(scope="session")
def timm_run(train):
    """A run of a timm backbone with batch norm, on RGB images from files."""
    return train(model="timm", data="folder", model__backbone="lcnet_035")


PROGRAM = """
import contextlib, io, json, os, sys
sys.modules["dgavg"] = None  # not importable
printed = []
for folder, code in json.load(sys.stdin):
    os.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, {})
    printed.append(out.getvalue())
print(json.dumps(printed))
"""


@pytest.fixture(scope="session")
def without_dgavg():
    """`without_dgavg([(folder, code), ...])`: what programs print that can't import dgavg."""

    def run(jobs):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            input=json.dumps([(str(folder), code) for folder, code in jobs]),
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run
