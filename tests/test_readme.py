"""What the README shows works: its Python runs, its commands compose, its error is real."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from torch import nn

from dgavg import UserError, chain
from dgavg.cli import COMMANDS, main
from dgavg.config import compose, explained
from dgavg.sweep.multirun import Multirun
from dgavg.sweep.words import read_words

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def block(marker: str) -> str:
    return next(b for b in BLOCKS if marker in b)


def commands() -> list[list[str]]:
    """The arguments of every `dgavg` command in a block that trains something."""
    lines = re.findall(r"^(?:\$ )?dgavg(.*)$", README, re.MULTILINE)
    words = [shlex.split(line, comments=True) for line in lines if not line.startswith(":")]
    others = (*COMMANDS, "--cfg")
    return [w for w in words if not w or w[0] not in others]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_composes(words):
    overrides = [w for w in words if w != "-m"]
    if "trainer=irm_ma_basic" in overrides:
        return  # shown for its error, below
    if "-m" in words:
        check_sweep(words)
        return
    config = compose(overrides)
    chain("_".join(config.trainer), **{k: dict(v) for k, v in config.trainer.items()})


def check_sweep(words):
    """Compose every combination of a sweep, where its engine is installed."""
    try:
        with explained():
            sweep = Multirun(read_words(words, COMMANDS))
            found = [[]] if sweep.scored else sweep.combinations()
    except UserError as error:
        if "hydra/launcher=ray is not installed" in str(error):
            pytest.skip(str(error))
        raise
    finally:
        GlobalHydra.instance().clear()
    for overrides in found:
        links = compose(overrides).trainer
        chain("_".join(links), **{k: dict(v) for k, v in links.items()})


def test_the_error_that_is_shown_is_the_one_printed(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command, line = re.search(r"^\$ dgavg (.*)\n(dgavg: .*)$", README, re.MULTILINE).groups()
    assert main(shlex.split(command)) == 2
    assert capsys.readouterr().err.strip() == line


@pytest.mark.slow
def test_the_python_door_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {}
    exec(block("leave_one_domain_out("), space)
    assert "ma_ema_irm_basic" in capsys.readouterr().out
    frame = space["table"].to_frame()  # type: ignore[attr-defined]
    assert len(frame) == 6 * 2 * 4  # folds, seeds, candidates: live, ma, ema


def test_the_run_that_is_shown_trains():
    space: dict[str, object] = {}
    exec(block('Run("ema_coral_basic"'), space)
    run = space["run"]
    assert run.t == 100  # type: ignore[attr-defined]
    assert set(run.candidates()) == {"live", "ema"}  # type: ignore[attr-defined]


def test_the_link_that_is_shown_works_by_name():
    exec(block('@trainer("margin")'), {"__name__": __name__})
    assert chain("ma_margin_basic", margin={"weight": 0.2}).inner.weight == 0.2
    with pytest.raises(UserError, match=r"no setting 'wieght' in trainer\.margin"):
        chain("margin_basic", margin={"wieght": 0.2})


def test_the_averages_that_are_shown_work():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    batches = [torch.randn(16, 4) for _ in range(3)]
    found = []
    space = {"model": model, "batches": batches}
    space["validate"] = lambda model: found.append(model[1].running_mean.clone())
    exec(block("ExponentialMean(model"), space)
    seen = torch.cat(batches) @ model[0].weight.T + model[0].bias
    torch.testing.assert_close(found, [seen.mean(dim=0)])
    assert not model[1].running_mean.any()  # its own again


def test_every_link_is_in_the_readme():
    from dgavg.chain import known_trainers

    table = README.partition("## The links")[2].partition("## ")[0]
    assert set(known_trainers()) <= set(re.findall(r"`(\w+)`", table))
