"""Runs to combine, trained once: small, real, and left alone by every test."""

from __future__ import annotations

import pytest

from dgavg import cli
from dgavg.data import load

RATES = (0.01, 0.02, 0.03)
SMALL = [
    *("model.width=8", "protocol.steps=60", "protocol.eval_every=20", "holdout=[0,30]"),
    *("device=cpu", "seeds=[0,1]", "data.angles=[0,30,60]", "data.size=8"),
]


@pytest.fixture(scope="session")
def small():
    """The settings of all runs here."""
    return SMALL


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """`runs/`: three learning rates × two folds × two seeds; `same/`: two with one init_seed."""
    top = tmp_path_factory.mktemp("soups")
    rates = ",".join(map(str, RATES))
    words = ["-m", "trainer=ema_basic", f"optimizer.lr={rates}", *SMALL, f"runs={top}/runs"]
    assert cli.main(words) == 0
    words = ["-m", "trainer=sma_basic", "trainer.sma.start=0.2", "optimizer.lr=0.01,0.03", *SMALL]
    assert cli.main([*words, "init_seed=7", f"runs={top}/same"]) == 0
    return top


@pytest.fixture
def dgavg(home, tmp_path, monkeypatch, capsys):
    """`dgavg(words)`: what it prints; `{home}` in words is that of the runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DGAVG_DEBUG", raising=False)
    capsys.readouterr()  # of the fixture that trained

    def run(words, *more, status=0):
        found = cli.main([*words.format(home=home).split(), *more])
        out, error = capsys.readouterr()
        assert found == status, error
        return out, error

    return run


@pytest.fixture(scope="session")
def digits():
    return load("digits_rotated", angles=[0, 30, 60], size=8)
