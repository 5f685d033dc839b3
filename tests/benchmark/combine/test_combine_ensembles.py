"""`dgavg ensemble`, and what is made of the runs of all seeds."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from soups import (
    assert_close,
    assert_first_statistics,
    images_of,
    logits_of,
    mean_of,
    members,
    names,
    only,
    record_of,
)


def test_an_ensemble_adds_logits(dgavg, home, tmp_path, digits):
    out, error = dgavg("ensemble {home}/runs --candidate ema runs=soups")
    folder = only(tmp_path / "soups")
    assert folder.name.startswith("ensemble-digits_rotated-")
    for held_out, seed in (("0", 0), ("30", 1)):
        record = record_of(folder, held_out, seed)
        assert record["chain"] == "ensemble of ema"
        found = record["candidates"]["ensemble"]
        assert found["batchnorm"] == "average"
        parts = {f"{held_out}/in": images_of(digits, held_out, seed, "test")[0]}
        others = [d.name for d in digits.domains if d.name != held_out]
        outs = images_of(digits, held_out, seed, "validation")
        parts |= {f"{d}/out": part for d, part in zip(others, outs, strict=True)}
        assert found["splits"].keys() == parts.keys()
        for name, (x, y) in parts.items():
            states = members(home, held_out, seed, "ema")
            total = sum(logits_of(weights, x).double() for weights in states)
            score = found["splits"][name]
            assert score["accuracy"] == (total.argmax(1) == y).sum().item() / len(y), name
            loss = F.cross_entropy(total / 3, y).item()
            assert score["loss"] == pytest.approx(loss, rel=1e-4), name
            assert score["n"] == len(y)
    assert not (folder / "0/0/weights").exists()
    assert "ensemble of ema" in out
    assert error.startswith("ensemble of ema, hold out 0, seed 0 [1/4]: ")


def test_an_ensemble_of_all_seeds_is_scored_on_the_whole_domain(dgavg, home, tmp_path, digits):
    out, error = dgavg("ensemble {home}/runs --candidate ema runs=soups --across-seeds")
    folder = only(tmp_path / "soups")
    ((x, y),) = images_of(digits, "30", 0, "whole")
    states = [s for seed in (0, 1) for s in members(home, "30", seed, "ema")]
    total = sum(logits_of(weights, x).double() for weights in states)
    right = (total.argmax(1) == y).float().mean().item()
    record = record_of(folder, "30", -1)
    assert record["protocol"]["test_split"] == "all"
    assert list(record["candidates"]["ensemble"]["splits"]) == ["30/in", "30/out"]
    assert [(m["run"], m["seed"]) for m in record["members"]] == [
        (name, seed) for name in names(home) for seed in (0, 1)
    ]
    runs, mine = out.split("\n\ndigits_rotated")  # a table each, since the test images differ
    assert "ensemble" not in runs
    assert "the runs of all seeds together" in mine
    (row,) = [line for line in mine.splitlines() if line.startswith("ensemble of ema, all seeds")]
    assert row.split()[7] == f"{100 * right:.1f}"
    assert "X" not in row
    assert "hold out 30 [2/2]: " in error
    assert "(6 runs, " in error
    shutil.copytree(home / "runs", tmp_path / "soups", dirs_exist_ok=True)
    for rule in ("last", "validation"):
        assert dgavg(f"report soups --rule {rule}")[0].count("against live") == 2


def test_a_soup_of_all_seeds_needs_one_start(dgavg, home, tmp_path, digits):
    _, error = dgavg("soup {home}/runs --across-seeds runs=soups", status=2)
    a = names(home)[0]
    assert error == (
        f"dgavg: {a} (seed 1, init_seed null) and {a} (seed 0, init_seed null) began with "
        "different weights, so their average is no model: train them with one init_seed=0, or use "
        "dgavg ensemble\n"
    )
    assert not (tmp_path / "soups").exists()
    dgavg("soup {home}/same --across-seeds runs=soups")
    folder = only(tmp_path / "soups")
    weights = load_file(folder / "30/-1/weights/soup.safetensors")
    states = [s for seed in (0, 1) for s in members(home, "30", seed, runs="same")]
    assert_close(weights, mean_of(states), skip=("running_mean", "running_var"))
    images = torch.cat([x for x, _ in images_of(digits, "30", 0, "all training")])
    first = images.flatten(1).double() @ weights["featurizer.1.weight"].double().T
    assert_first_statistics(weights, first)
    ((x, y),) = images_of(digits, "30", 0, "whole")
    splits = record_of(folder, "30", -1)["candidates"]["soup"]["splits"]
    right = sum(s["accuracy"] * s["n"] for s in splits.values())
    assert right == pytest.approx((logits_of(weights, x).argmax(1) == y).sum().item())


def test_runs_whose_test_split_is_all_share_the_table_with_their_soup(dgavg, tmp_path, small):
    words = [*small[:3], "seeds=[0,1]", "holdout=[0]", "device=cpu", "protocol.test_split=all"]
    train = ["-m", "trainer=ema_basic", "optimizer.lr=0.01,0.03", "init_seed=7", *words]
    dgavg(" ".join(train))
    out, _ = dgavg("soup runs --across-seeds")
    assert out.count("against live") == 1
    (row,) = [line for line in out.splitlines() if line.startswith("uniform soup of live, all")]
    assert "X" not in row
    assert "±" not in row


@pytest.mark.parametrize("rule", ["greedy", "restricted", "learned"])
def test_rules_that_read_validation_scores_are_for_one_seed(rule, dgavg, tmp_path):
    _, error = dgavg(f"soup {{home}}/same --across-seeds --rule {rule}", status=2)
    assert error == (
        f"dgavg: --rule {rule} --across-seeds: runs of different seeds have no validation data in "
        "common; write --rule uniform\n"
    )
    assert not any(tmp_path.iterdir())


def test_seeds_of_one_start_are_still_groups_of_their_own(dgavg, home, tmp_path):
    dgavg("soup {home}/same runs=soups --candidate sma")
    folder = only(tmp_path / "soups")
    weights = load_file(folder / "0/1/weights/soup.safetensors")
    expected = mean_of(members(home, "0", 1, "sma", runs="same"))
    assert_close(weights, expected, skip=("running_mean", "running_var"))
