"""`dgavg soup`: what it makes of real runs by each rule, held against slow plain code."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from safetensors.torch import load_file
from soups import (
    accuracy,
    assert_close,
    assert_first_statistics,
    held_out_accuracy,
    images_of,
    logits_of,
    mean_of,
    members,
    names,
    only,
    record_of,
    state,
)


def test_a_uniform_soup_is_the_mean_with_statistics_of_its_own(dgavg, home, tmp_path, digits):
    _, error = dgavg("soup {home}/runs runs=soups")
    folder = only(tmp_path / "soups")
    assert folder.name.startswith("uniform-soup-digits_rotated-")
    for held_out in ("0", "30"):
        for seed in (0, 1):
            weights = load_file(folder / f"{held_out}/{seed}/weights/soup.safetensors")
            expected = mean_of(members(home, held_out, seed))
            assert_close(weights, expected, skip=("running_mean", "running_var"))
            images = torch.cat([x for x, _ in images_of(digits, held_out, seed, "training")])
            first = images.flatten(1).double() @ weights["featurizer.1.weight"].double().T
            assert_first_statistics(weights, first)
            record = record_of(folder, held_out, seed)
            score = record["candidates"]["soup"]["splits"][f"{held_out}/in"]
            ((x, y),) = images_of(digits, held_out, seed, "test")
            logits = logits_of(weights, x)
            assert score["accuracy"] == (logits.argmax(1) == y).sum().item() / len(y)
            assert score["loss"] == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)
            assert score["n"] == len(y)
    assert error.count("\n") == 4
    assert error.startswith("uniform soup of live, hold out 0, seed 0 [1/4]: ")
    assert "(3 runs, " in error


def test_batch_norm_may_be_averaged_too(dgavg, home, tmp_path):
    dgavg("soup {home}/runs runs=soups --batchnorm average --candidate ema --name mine")
    for seed in (0, 1):
        weights = load_file(tmp_path / f"soups/mine/0/{seed}/weights/soup.safetensors")
        assert_close(weights, mean_of(members(home, "0", seed, "ema")))
        record = record_of(tmp_path / "soups/mine", "0", seed)
        assert record["candidates"]["soup"]["batchnorm"] == "average"


def test_a_record_says_what_it_is_made_of(dgavg, home, tmp_path):
    dgavg("soup {home}/runs runs=soups")
    folder = only(tmp_path / "soups")
    record = record_of(folder, "30", 1)
    assert record["chain"] == "uniform soup of live"
    rule = {"candidate": "live", "across_seeds": False, "rule": "uniform"}
    assert record["trainer"] == {"soup": {**rule, "batchnorm": "recalibrate"}}
    assert (record["held_out"], record["seed"]) == ("30", 1)
    runs = sorted(path.name for path in (home / "runs").iterdir())
    assert [m["run"] for m in record["members"]] == runs
    assert [m["share"] for m in record["members"]] == [1 / 3] * 3
    for member in record["members"]:
        assert member["candidate"] == "live"
        lines = (home / f"runs/{member['run']}/30/1/records.jsonl").read_text().splitlines()
        assert member["step"] in [json.loads(line)["step"] for line in lines]
    one = json.loads((home / f"runs/{runs[0]}/30/1/records.jsonl").read_text().splitlines()[0])
    for part in ("data", "model", "protocol", "precision", "device"):
        assert record[part] == one[part]
    assert record["candidates"]["soup"].keys() == {"batchnorm", "splits"}
    assert record["candidates"]["soup"]["splits"].keys() == one["candidates"]["live"][
        "splits"].keys()  # fmt: skip
    config = OmegaConf.to_container(OmegaConf.load(folder / "30/1/config.yaml"))
    assert list(config["members"]) == [f"{run}/1" for run in runs]
    assert (folder / "30/1/done").read_text() == "done"
    files = {str(p.relative_to(folder / "30/1")) for p in (folder / "30/1").rglob("*")}
    assert files == {"config.yaml", "records.jsonl", "weights", "weights/soup.safetensors", "done",
                     ".lock"}  # fmt: skip


def test_the_table_has_the_runs_and_what_is_made_of_them(dgavg, home, tmp_path):
    shutil.copytree(home / "runs", tmp_path / "runs")
    out, _ = dgavg("soup")
    assert out.count("against live") == 1
    assert out.endswith(
        "against its runs: the weights it is made of, each scored alone as it was\n"
    )
    rows = [line.split()[:2] for line in out.splitlines()[6:]]
    assert rows[:9:3] == [["ema_basic", f"optimizer.lr={x}"] for x in sorted_rates(home)]
    (soup,) = [line for line in out.splitlines() if line.startswith("uniform soup of live")]
    assert soup.endswith("better) against its runs")
    assert set(out.splitlines()) <= set(dgavg("report")[0].splitlines())
    gains = []
    for held_out in ("0", "30"):
        for seed in (0, 1):
            folder = next((tmp_path / "runs").glob("uniform*"))
            mine = held_out_accuracy(record_of(folder, held_out, seed), "soup")
            members = record_of(folder, held_out, seed)["members"]
            theirs = [m["splits"][f"{held_out}/in"]["accuracy"] for m in members]
            gains.append(100 * (mine - sum(theirs) / 3))
    assert f"{np.mean(gains):+.1f} ± {np.std(gains) / 2:.1f} (" in soup


def sorted_rates(home):
    """The learning rates in the order of the runs' names."""
    found = []
    for name in names(home):
        config = OmegaConf.load(home / f"runs/{name}/0/0/config.yaml")
        found.append(f"{config.optimizer.lr:g}")
    return found


@pytest.mark.parametrize("command", ["soup", "ensemble --candidate live"])
def test_a_second_time_it_is_only_printed(command, dgavg, tmp_path):
    first, _ = dgavg(f"{command} {{home}}/runs runs=soups")
    before = state(tmp_path / "soups")
    second, error = dgavg(f"{command} {{home}}/runs runs=soups")
    assert second == first
    assert error.count("done before)") == 4
    assert state(tmp_path / "soups") == before


def test_the_order_of_folders_makes_no_difference(dgavg, home, tmp_path):
    a, b, c = (f"{home}/runs/{name}" for name in names(home))
    dgavg(f"soup {a} {b} {c} runs=soups")
    before = state(tmp_path / "soups")
    dgavg(f"soup {c} {a} {b} {a} runs=soups")
    assert state(tmp_path / "soups") == before


# Rules that read validation scores.


def validation(weights, data, held_out, seed):
    return accuracy(weights, images_of(data, held_out, seed, "validation"))


def plain_greedy(states, score, ties):
    """By the definition: the members' indices and the score of their mean."""
    own = [score(s) for s in states]
    order = sorted(range(len(states)), key=lambda i: -own[i])
    kept, best = order[:1], own[order[0]]
    for i in order[1:]:
        found = score(mean_of([states[k] for k in [*kept, i]]))
        if found > best or (ties and found == best):
            kept, best = [*kept, i], found
    return kept, best


@pytest.mark.parametrize(("rule", "ties"), [("greedy", False), ("restricted", True)])
def test_a_greedy_soup_takes_the_runs_of_the_definition(rule, ties, dgavg, home, tmp_path, digits):
    dgavg(f"soup {{home}}/runs runs=soups --rule {rule} --batchnorm average")
    folder, sizes = only(tmp_path / "soups"), set()
    for held_out in ("0", "30"):
        for seed in (0, 1):
            states = members(home, held_out, seed)
            kept, best = plain_greedy(
                states, lambda w, at=(held_out, seed): validation(w, digits, *at), ties
            )
            record = record_of(folder, held_out, seed)
            shares = [m["share"] for m in record["members"]]
            assert shares == [1 / len(kept) if i in kept else 0 for i in range(3)]
            for member, weights in zip(record["members"], states, strict=True):
                own = validation(weights, digits, held_out, seed)
                assert member["validation"] == pytest.approx(own, abs=1e-6)
            splits = record["candidates"]["soup"]["splits"]
            outs = [v["accuracy"] for k, v in splits.items() if k.endswith("/out")]
            assert sum(outs) / len(outs) == pytest.approx(best, abs=1e-6)
            weights = load_file(folder / f"{held_out}/{seed}/weights/soup.safetensors")
            assert_close(weights, mean_of([states[i] for i in kept]))
            sizes.add(len(kept))
    assert sizes == {1, 2}  # so that the rule did choose


def test_a_recalibrated_greedy_soup_scores_what_it_was_chosen_for(dgavg, tmp_path):
    dgavg("soup {home}/runs runs=soups --rule greedy")
    record = record_of(only(tmp_path / "soups"), "0", 0)
    splits = record["candidates"]["soup"]["splits"]
    found = np.mean([v["accuracy"] for k, v in splits.items() if k.endswith("/out")])
    kept = [m for m in record["members"] if m["share"] > 0]
    assert max(m["tried"] for m in kept) == pytest.approx(found)
    assert found >= max(m["validation"] for m in record["members"])


def test_a_tie_is_let_in_by_the_restricted_rule_alone(dgavg, home, tmp_path):
    for name in ("a", "b"):  # the same run twice: their mean is as good as each
        shutil.copytree(home / "runs" / names(home)[0], tmp_path / "runs" / name)
    dgavg("soup runs/a/0/0 runs/b/0/0 --rule greedy --name greedy")
    dgavg("soup runs/a/0/0 runs/b/0/0 --rule restricted --name restricted")
    shares = {
        rule: [m["share"] for m in record_of(tmp_path / "runs" / rule, "0", 0)["members"]]
        for rule in ("greedy", "restricted")
    }
    assert shares == {"greedy": [1.0, 0.0], "restricted": [0.5, 0.5]}


@pytest.fixture(scope="module")
def one_fold(home):
    """The runs of one fold and seed, as words."""
    return " ".join(f"{home}/runs/{name}/0/0" for name in names(home))


def test_a_learned_soup_has_the_weights_of_its_shares(dgavg, home, tmp_path, one_fold):
    found = {}
    for policy in ("average", "recalibrate"):
        words = f"--rule learned --batchnorm {policy} --name {policy}"
        _, error = dgavg(f"soup {one_fold} runs=soups {words}")
        record = record_of(tmp_path / "soups" / policy, "0", 0)
        found[policy] = shares = [m["share"] for m in record["members"]]
        assert sum(shares) == pytest.approx(1)
        assert max(shares) - min(shares) > 0.05
        weights = load_file(tmp_path / f"soups/{policy}/0/0/weights/soup.safetensors")
        skip = () if policy == "average" else ("running_mean", "running_var")
        assert_close(weights, mean_of(members(home, "0", 0), shares), skip=skip)
        assert record["trainer"]["soup"]["steps"] == 100
        assert abs(record["temperature"] - 1) > 0.1  # it was learned along
        assert "(3 runs, " in error
    assert found["average"] != found["recalibrate"]  # which is learned as it will be used


def test_a_learned_soup_has_a_lower_validation_loss_than_the_mean(
    dgavg, tmp_path, digits, one_fold
):
    losses = {}
    for rule in ("learned", "uniform"):
        dgavg(f"soup {one_fold} runs=soups --rule {rule} --batchnorm average --name {rule}")
        weights = load_file(tmp_path / f"soups/{rule}/0/0/weights/soup.safetensors")
        parts = images_of(digits, "0", 0, "validation")
        logits = torch.cat([logits_of(weights, x) for x, _ in parts])
        labels = torch.cat([y for _, y in parts])
        scales = torch.linspace(0.2, 8, 200)  # of the temperature, which is learned along
        losses[rule] = min(F.cross_entropy(b * logits, labels).item() for b in scales)
    assert losses["learned"] < losses["uniform"]
