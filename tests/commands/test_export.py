"""`dgavg export`."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from dgavg import leave_one_domain_out
from dgavg.commands.export import export
from dgavg.errors import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of a tiny model on digits."""
    home = tmp_path_factory.mktemp("runs")
    leave_one_domain_out(
        "ema_basic",
        seeds=[0],
        holdout=[45],
        runs=home,
        name="tiny",
        quiet=True,
        settings={"protocol.steps": 4, "protocol.eval_every": 2, "model.width": 8},
    )
    return str(home / "tiny" / "45" / "0")


def test_a_run_becomes_a_folder(run, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    out = tmp_path / "out"
    export([run, "--out", str(out), "--candidate", "ema", "--onnx", "--torch-export"])
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "classes.json",
        "model.onnx",
        "model.pt2",
        "model.safetensors",
        "preprocessing.json",
    }
    printed = capsys.readouterr()
    assert printed.out == f"{out}\n"
    first, *others = printed.err.splitlines()
    assert first.startswith("dgavg: ema_basic, hold out 45, seed 0: ema of step")
    assert [line.partition(" differs ")[0] for line in others] == [
        "dgavg: model.pt2",
        "dgavg: model.onnx",
    ]
    assert "candidate `ema`" in (out / "README.md").read_text()


def test_mistakes_are_one_line(run, tmp_path):
    out = ["--out", str(tmp_path / "out")]
    for words, part in (
        ([*out], "one RUN"),
        ([run, run, *out], "here are 2"),
        ([run], "--out DIR"),
        ([run, *out, "--format", "keras"], "timm"),
        ([run, *out, "--format", "timm"], "not timm's"),
        ([run, *out, "--candidate", "sma"], "live, ema"),
        ([run, *out, "--domainbed", "other"], "no other option"),
        ([run, "--onnx", "--domainbed", "other"], "no other option"),
        ([run, "--format", "timm", "--domainbed", "other"], "no other option"),
        ([str(tmp_path), *out], "is no run"),
    ):
        with pytest.raises(UserError) as caught:
            export(words)
        assert part in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_records_go_to_domainbed_by_another_function(run, monkeypatch):
    calls = []
    module = ModuleType("dgavg.commands.export_domainbed")
    module.export_domainbed = lambda folders, out: calls.append((folders, out))
    monkeypatch.setitem(sys.modules, "dgavg.commands.export_domainbed", module)
    export([run, "other", "--domainbed", "there"])
    export(["--domainbed", "there"])
    assert calls == [
        ([Path(run), Path("other")], Path("there")),
        ([Path("runs")], Path("there")),
    ]
