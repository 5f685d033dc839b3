"""evaluate=picked: the held-out domain is scored only where validation picks the checkpoint."""

from __future__ import annotations

import json

import pytest

from dgavg import UserError
from dgavg.benchmark import Table
from dgavg.benchmark.domainbed.convert import convert
from dgavg.benchmark.leave_one_out import leave_one_domain_out
from dgavg.benchmark.reading import read_runs
from dgavg.commands.report import report
from dgavg.evaluation.selection import validation_score

SETTINGS = {
    "protocol.steps": 60,
    "protocol.eval_every": 6,
    "trainer.sma.start": 13,
    "trainer.aswa.start": 0.5,
}


def train(folder, evaluate, **more):
    return leave_one_domain_out(
        "sma_aswa_basic",
        seeds=[0],
        runs=folder,
        settings={"holdout": ["0", "75"], **SETTINGS, "evaluate": evaluate, **more},
        quiet=True,
    )


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folders = {k: tmp_path_factory.mktemp(k) for k in ("selection", "picked")}
    return folders, {k: train(folder, k) for k, folder in folders.items()}


def records(folder):
    return [
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(folder.rglob("records.jsonl"))
    ]


def test_all_else_is_as_with_selection(both):
    folders, tables = both
    left_out = 0
    for some, whole in zip(records(folders["picked"]), records(folders["selection"]), strict=True):
        for record, expected in zip(some, whole, strict=True):
            assert record["losses"] == expected["losses"]
            assert record["candidates"].keys() == expected["candidates"].keys()
            for name, found in record["candidates"].items():
                other = expected["candidates"][name]["splits"]
                test = f"{record['held_out']}/in"
                left_out += test not in found["splits"]
                wanted = {k: v for k, v in other.items() if k in found["splits"] or k != test}
                assert list(found["splits"].items()) == list(wanted.items())
    assert left_out > 5
    rows = [t.to_frame().drop(columns="run") for t in tables.values()]
    assert rows[0].equals(rows[1])
    for name in ("live", "sma", "aswa"):
        files = [sorted(f.rglob(f"{name}.safetensors")) for f in folders.values()]
        for one, other in zip(*files, strict=True):
            assert one.read_bytes() == other.read_bytes()


def test_what_is_scored_is_the_best_so_far_and_the_end(both):
    folders, _ = both
    for each in records(folders["picked"]):
        best: dict[str, float] = {}
        for record in each:
            for name, found in record["candidates"].items():
                score = validation_score(found["splits"], record["held_out"])
                expected = score > best.get(name, -1.0) or record["step"] == 60
                assert (f"{record['held_out']}/in" in found["splits"]) == expected
                best[name] = max(score, best.get(name, -1.0))


def test_what_reads_every_checkpoint_says_so(both):
    runs, _ = read_runs([both[0]["picked"]])
    assert "live" not in Table(runs).correlations()
    with pytest.raises(UserError, match="evaluate=selection, not picked"):
        convert(runs)
    with pytest.raises(UserError, match="evaluate=all"):
        str(Table(runs, "oracle_best"))
    assert Table(runs, "last")


def test_early_stopping_ends_where_nothing_was_tested(tmp_path):
    stopping = {"stopping.candidate": "live", "stopping.patience": 2, "protocol.eval_every": 3}
    train(tmp_path, "picked", **stopping)
    runs, _ = read_runs([tmp_path])
    ends = [records[-1] for each in runs.values() for records in each]
    assert any(
        "0/in" not in e["candidates"]["live"]["splits"] for e in ends if e["held_out"] == "0"
    )
    assert Table(runs)
    with pytest.raises(UserError, match=r"last picks step \d+ of live, where '0' was not scored"):
        Table(runs, "last")


def test_loo_needs_every_checkpoint(tmp_path):
    train(tmp_path, "picked", holdout="pairs", **{"data.angles": [0, 30, 60]})
    runs, _ = read_runs([tmp_path])
    with pytest.raises(UserError, match=r"the rule loo reads \d+/in at every checkpoint"):
        Table(runs, "loo")


def test_the_page_shows_what_there_is(both, tmp_path):
    pytest.importorskip("matplotlib")
    report([str(both[0]["picked"]), "--html", str(tmp_path / "page.html")])
    assert "sma_aswa_basic" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_other_rules_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"picked goes by validation or .*=oracle_best: write ev"):
        train(tmp_path / "r", "picked", **{"protocol.selection": "oracle_best"})
    assert not (tmp_path / "r").exists()
