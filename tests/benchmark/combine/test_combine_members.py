"""What records say of the members: each run's own weights, scored as the soup is."""

from __future__ import annotations

import json
import shutil

import pytest
from soups import names, only, record_of


@pytest.fixture
def twice(home, tmp_path):
    """`runs/a` and `runs/b`: a run and its identical copy."""
    for name in ("a", "b"):
        run = home / "runs" / names(home)[0]
        shutil.copytree(run / "0/0", tmp_path / "runs" / name / "0/0")


@pytest.mark.parametrize("policy", ["recalibrate", "average"])
def test_a_soup_of_a_run_and_its_copy_scores_what_they_do(policy, dgavg, twice, tmp_path):
    out, _ = dgavg(f"soup --name mine --batchnorm {policy}")
    assert " +0.0 against its runs\n" in out
    record = record_of(tmp_path / "runs/mine", "0", 0)
    a, b = (member["splits"] for member in record["members"])
    assert a == b == record["candidates"]["soup"]["splits"]
    own = selected(tmp_path / "runs/a/0/0", record["members"][0]["step"])
    assert (a == own) == (policy == "average")  # the run's weights had running statistics


def selected(run, step, candidate="live"):
    """The scores in a run's own record."""
    lines = map(json.loads, (run / "records.jsonl").read_text().splitlines())
    (found,) = [x for x in lines if x["step"] == step]
    return found["candidates"][candidate]["splits"]


@pytest.mark.parametrize("rule", ["uniform", "greedy", "restricted", "learned"])
def test_members_are_scored_as_they_were_under_every_rule(rule, dgavg, home, tmp_path):
    runs = [home / "runs" / name / "0/0" for name in names(home)]
    words = " ".join(map(str, runs))
    dgavg(f"soup {words} --candidate ema --batchnorm average --rule {rule} runs=soups")
    members = record_of(only(tmp_path / "soups"), "0", 0)["members"]
    for run, member in zip(runs, members, strict=True):
        assert member["splits"] == selected(run, member["step"], "ema")


def test_members_of_an_ensemble_are_scored_alone(dgavg, home, tmp_path):
    dgavg("ensemble {home}/runs --candidate live runs=soups")
    for held_out in ("0", "30"):
        members = record_of(only(tmp_path / "soups"), held_out, 1)["members"]
        assert len(members) == 3
        for member in members:
            own = selected(home / f"runs/{member['run']}/{held_out}/1", member["step"])
            assert member["splits"].keys() == own.keys()
            for split, score in member["splits"].items():
                assert score == pytest.approx(own[split], rel=1e-5)


def test_across_seeds_members_are_scored_on_the_whole_domain(dgavg, home, tmp_path):
    dgavg("soup {home}/same --across-seeds runs=soups")
    record = record_of(only(tmp_path / "soups"), "30", -1)
    expected = {k: v["n"] for k, v in record["candidates"]["soup"]["splits"].items()}
    assert len(record["members"]) == 4
    for member in record["members"]:
        assert {k: v["n"] for k, v in member["splits"].items()} == expected
