"""candidates=[...]: those and what links decide by are scored; training and their scores stay."""

from __future__ import annotations

import re

import pytest
import torch

from dgavg import Trainer, UserError, trainer
from dgavg.benchmark import Table
from dgavg.benchmark.reading import read_runs
from dgavg.chain import find_trainer
from tests.links import ACTING

ALONE = {"seeds": [0, 1], "holdout": ["d0", "d1"]}


BIAS = "classifier.bias", "classifier.stacked.bias"


def of(table, candidate):
    """The rows of a candidate, without the names of runs."""
    rows = table.to_frame().drop(columns="run")
    return rows[rows["candidate"] == candidate].reset_index(drop=True)


def runs_of(folder):
    return sorted(path.parent for path in folder.rglob("config.yaml"))


@pytest.mark.parametrize("stack", [1, 4])
def test_only_those_are_scored_and_as_ever(train, records_of, weights_of, stack):
    every, whole = train(
        "sma_ema_basic", folder="whole", stack=stack, trainer__sma__start=10, **ALONE
    )
    some, chosen = train(
        "sma_ema_basic",
        folder="chosen",
        stack=stack,
        trainer__sma__start=10,
        candidates=["ema"],
        also_batchnorm=["keep"],
        **ALONE,
    )
    assert set(some.to_frame()["candidate"]) == {"ema", "ema@keep", "selected"}
    assert of(some, "ema").equals(of(every, "ema"))
    for one, other in zip(runs_of(chosen), runs_of(whole), strict=True):
        assert sorted(weights_of(one)) == ["ema", "ema@keep"]
        for record, expected in zip(records_of(one), records_of(other), strict=True):
            assert list(record["candidates"]) == ["ema", "ema@keep"]
            assert record["candidates"]["ema"] == expected["candidates"]["ema"]
            assert record["losses"] == expected["losses"]
        for key, tensor in weights_of(other)["ema"].items():
            assert torch.equal(weights_of(one)["ema"][key], tensor)


def test_what_decides_is_scored_too(train, only_run, records_of):
    def ends(folder, spec, **more):
        run = only_run(train(spec, folder=folder, **more)[1])
        return records_of(run)[-1]

    swad = {"trainer__swad__n_converge": 1, "trainer__swad__n_tolerance": 2}
    found = ends("a", "ema_swad_basic", candidates=["ema"], **swad)
    expected = ends("b", "ema_swad_basic", **swad)
    assert list(found["candidates"]) == ["live", "ema", "swad"]
    assert found["candidates"] == expected["candidates"]
    stopping = {"stopping__candidate": "live", "stopping__patience": 1, "every": 2, "steps": 80}
    stopping["optimizer__lr"] = 0.03
    found, expected = (
        ends(name, "ema_basic", candidates=names, **stopping)
        for name, names in (("c", ["ema"]), ("d", None))
    )
    assert found["step"] == expected["step"] < 80
    assert list(found["candidates"]) == ["live", "ema"]
    found = ends("e", "ema_autolr_basic", candidates=["live"], trainer__autolr__candidate="ema")
    assert list(found["candidates"]) == ["live", "ema"]
    found = ends("f", "ema_autolr_basic", candidates=["live"], trainer__autolr__drops=[5])
    assert list(found["candidates"]) == ["live"]


def test_chains_are_compared_by_what_they_scored(train):
    for spec in ("ema_basic", "ema_mixup_basic"):
        _, runs = train(spec, candidates=["ema"], **ALONE)
    records, _ = read_runs([runs])
    title, (head, row) = Table(records).difference_lines()
    assert title.startswith("difference to ema_basic, paired")
    assert head == ["chain", "live", "selected"]
    assert row[:2] == ["ema_mixup_basic", ""]
    assert re.fullmatch(r"[+-]\d+\.\d \[.*\]", row[2])


def test_they_are_other_runs(train):
    for names in (None, ["ema"], ["ema", "live"]):
        _, runs = train(candidates=names)
    train(candidates=["live", "ema", "live"])
    assert len(runs_of(runs)) == 3
    records, _ = read_runs([runs])
    assert {label for label in Table(records).labels.values() if "scored=" in label} == {
        "ema_basic scored=[ema]",
        "ema_basic scored=[ema,live]",
    }


@pytest.mark.parametrize("stack", [1, 2])
def test_no_record_before_they_begin(train, records_of, stack):
    settings = {"trainer__sma__start": 10, "stack": stack, "seeds": [0, 1]}
    _, some = train("sma_basic", folder="some", candidates=["sma"], **settings)
    _, whole = train("sma_basic", folder="whole", **settings)
    for one, other in zip(runs_of(some), runs_of(whole), strict=True):
        found, expected = records_of(one), records_of(other)
        assert [r["step"] for r in found] == [16, 24]
        assert [r["step"] for r in expected] == [8, 16, 24]
        mean = sum(r["losses"]["total"] for r in expected[:2]) / 2
        assert found[0]["losses"]["total"] == pytest.approx(mean)  # of all steps since the start


@pytest.mark.parametrize("name", [k for k in ACTING if find_trainer(k)().candidate_names()])
def test_every_average_can_stand_alone(train, only_run, records_of, name):
    settings = {f"trainer__{name}__{k}": v for k, v in ACTING[name].items()}
    names = find_trainer(name)(**ACTING[name]).candidate_names()
    _, runs = train(f"{name}_basic", candidates=names[-1:], steps=24, every=6, **settings)
    assert names[-1] in records_of(only_run(runs))[-1]["candidates"]


@pytest.fixture
def poison():
    """A link that ruins the weights right after step 15, before the evaluation at 16."""

    @trainer("ruin", stackable=True)
    class Ruin(Trainer):
        def after_step(self, run):
            if run.t == 16:
                (bias,) = (v for k, v in run.live.items() if k in BIAS)
                bias.view(-1)[-1] = float("nan")

    return lambda: find_trainer("ema")(Ruin(find_trainer("basic")()))


@pytest.mark.parametrize("stack", [1, 2])
def test_weights_that_are_ruined_are_seen_without_live_scores(poison, train, stack):
    with pytest.raises(UserError, match=r"step 16: the norm of the live weights is "):
        train(poison(), candidates=["ema"], stack=stack, holdout=["d0", "d1"])


@pytest.mark.parametrize("stack", [1, 2])
def test_so_are_those_of_a_run_without_validation_data(poison, train, make_data, stack):
    data = make_data([60, 60, 60])
    settings = {"protocol__holdout_fraction": 0, "protocol__selection": "last", "stack": stack}
    with pytest.raises(UserError, match=r"step 16: the (training loss|norm) of the live weights "):
        train(poison(), data, holdout=["d0", "d1"], **settings)


@pytest.mark.parametrize(
    ("wanted", "line"),
    [
        (
            ["emo"],
            r"no candidate 'emo' in the chain 'ema_basic' \(candidates\); did you mean 'ema'",
        ),
        ([], r"candidates=\[\]: name at least one, or write candidates=null for all"),
        (
            ["ema@keep"],
            r"candidates: 'ema@keep' is 'ema' by another batch-norm policy: write ema, and "
            r"also_batchnorm=\[keep\]",
        ),
        ("ema", r"candidates must be a list: write candidates=\[...\]"),
    ],
)
def test_refused(train, tmp_path, wanted, line):
    with pytest.raises(UserError, match=line):
        train(candidates=wanted)
    assert not (tmp_path / "runs").exists()
