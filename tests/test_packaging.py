"""The wheel holds all that a run needs: built, installed aside, run in an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run([*build, str(ROOT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("dgavg-*.whl"))


def test_the_wheel_holds_the_package_and_its_configuration_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    inside = {str(p.relative_to(ROOT)) for p in (ROOT / "conf").rglob("*.yaml")}
    assert {f"dgavg/{name}" for name in inside} <= set(names)
    assert {f"dgavg/report/page.{kind}" for kind in ("html", "css", "js")} <= set(names)
    assert {n.partition("/")[0].partition("-")[0] for n in names} == {"dgavg"}
    assert "dgavg/cli.py" in names


def test_an_installed_dgavg_runs_from_an_empty_folder(wheel, tmp_path):
    """Without the source tree: the package and `conf/` come from the wheel."""
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site)]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    command = [
        *(sys.executable, "-m", "dgavg", "trainer=ma_ema_basic", "seeds=[0]", "holdout=[0,45]"),
        *("protocol.steps=40", "protocol.eval_every=20"),
    ]
    where = [sys.executable, "-c", "import dgavg.config as c; print(c.CONF)"]
    found = subprocess.run(where, cwd=empty, env=environment, capture_output=True, text=True)
    assert Path(found.stdout.strip()) == site / "dgavg" / "conf"
    done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ma_ema_basic" in done.stdout
    assert sorted(p.name for p in empty.iterdir()) == ["runs"]
