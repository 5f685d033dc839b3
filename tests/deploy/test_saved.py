"""A model rebuilt from a run's folder."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from omegaconf import OmegaConf

from dgavg import leave_one_domain_out
from dgavg.benchmark.combine import combine
from dgavg.benchmark.recipe import Recipe
from dgavg.data import load
from dgavg.deploy import load_run
from dgavg.deploy.card import model_card
from dgavg.deploy.predict import probabilities


def _accuracy(run, data, domain, rows=slice(None)):
    found = data.domains[data.index(domain)]
    chances = probabilities([run], found.images[rows].float() / 255)
    return (chances.argmax(dim=1) == found.labels[rows]).double().mean().item()


@pytest.fixture(scope="module")
def digits():
    return load("digits_rotated", angles=[0, 15, 30, 45, 60, 75], size=16, shuffle_seed=0)


@pytest.fixture
def copied(train, tmp_path):
    """A run's folder that a test may damage."""
    return shutil.copytree(train(), tmp_path / "runs" / "tiny" / "45" / "0")


@pytest.mark.parametrize("candidate", ["live", "ema"])
def test_the_model_scores_what_its_record_says(train, digits, candidate):
    run = load_run(train(), candidate)
    parts = [run.scores[f"45/{part}"] for part in ("in", "out")]
    n = sum(part["n"] for part in parts)
    recorded = sum(part["accuracy"] * part["n"] for part in parts) / n
    assert _accuracy(run, digits, "45") == pytest.approx(recorded, abs=1e-9)
    assert n == len(digits.domains[3])
    assert not run.model.training


def test_it_knows_what_it_was_trained_on(train):
    run = load_run(str(train()))
    assert run.classes == tuple("0123456789")
    assert run.input_shape == (1, 16, 16)
    assert run.domains == ("0", "15", "30", "45", "60", "75")
    assert run.name == "ema_basic, hold out 45, seed 0"
    assert run.support is None


def test_by_default_it_is_the_best_on_validation_over_candidates_and_checkpoints(train):
    folder = train("sma_ema_basic", trainer__sma__start=3, protocol__steps=12)
    run = load_run(folder)
    by_hand = {}
    for record in map(json.loads, (folder / "records.jsonl").read_text().splitlines()):
        for name, found in record["candidates"].items():
            scores = [
                v["accuracy"]
                for k, v in found["splits"].items()
                if k.endswith("/out") and not k.startswith("45/")
            ]
            by_hand[name, record["step"]] = sum(scores) / len(scores)
    best = max(by_hand.values())
    assert by_hand[run.candidate, run.record["step"]] == best
    worst = min((v, k) for k, v in by_hand.items())
    assert worst[0] < best, "all are equal: this test tells nothing"


def test_the_oracle_looks_at_the_held_out_domain(train):
    folder = train("ema_basic", protocol__selection="oracle")
    run = load_run(folder)
    last = json.loads((folder / "records.jsonl").read_text().splitlines()[-1])
    scores = {k: v["splits"]["45/out"]["accuracy"] for k, v in last["candidates"].items()}
    assert run.candidate == max(scores, key=scores.__getitem__)
    assert run.record["step"] == last["step"]


def test_weights_are_of_the_step_that_their_file_names(train, tmp_path):
    folder = shutil.copytree(train(), tmp_path / "run")
    config = OmegaConf.load(folder / "config.yaml")
    config.protocol.selection = "loo"  # whose runs of two domains are elsewhere
    OmegaConf.save(config, folder / "config.yaml")
    run, before = load_run(folder, "ema"), load_run(train(), "ema")
    assert run.record["step"] == before.record["step"]


def test_without_anything_to_choose_by_a_candidate_must_be_named(train, refuses):
    settings = {"protocol__holdout_fraction": 0, "protocol__selection": "last"}
    folder = train(**settings)
    with refuses("--candidate", "live, ema"):
        load_run(folder)
    assert load_run(folder, "ema").candidate == "ema"


def test_links_that_change_the_model_are_in_it(train, digits):
    for chain in ("mtl_basic", "arm_basic"):
        run = load_run(train(chain), "live")
        domain = digits.domains[3]
        parts = [run.scores[f"45/{part}"] for part in ("in", "out")]
        recorded = sum(part["accuracy"] * part["n"] for part in parts) / len(domain)
        assert _accuracy(run, digits, "45") == pytest.approx(recorded, abs=0.05)
    assert run.support == 32


def test_runs_that_left_two_domains_out_are_rebuilt_for_those_they_had(tmp_path):
    small = {"protocol.steps": 2, "protocol.eval_every": 2, "model.width": 8, "device": "cpu"}
    leave_one_domain_out(
        "mtl_basic",
        seeds=[0],
        holdout="pairs",
        runs=tmp_path,
        name="two",
        quiet=True,
        settings={**small, "data.angles": [0, 15, 30, 45]},
    )
    run = load_run(tmp_path / "two" / "15+45" / "0")
    assert run.name == "mtl_basic, hold out 15 and 45, seed 0"
    assert run.model.classifier.embeddings.shape == (2, 8)
    text = model_card(run, None, [])
    assert "Trained on the domains 0, 30; never on **15, 45**" in text


def test_rebuilding_draws_no_random_numbers_of_others(train):
    folder = train()
    before = torch.random.get_rng_state()
    load_run(folder)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_soup_is_a_model_too_and_an_ensemble_is_its_runs(train, tmp_path, refuses, digits):
    for seed, name in ((0, "a"), (1, "b")):
        source = train("ema_basic", init_seed=0, optimizer__lr=0.003 + seed / 1000)
        shutil.copytree(source, tmp_path / "runs" / name / "45" / "0")
    for kind in ("soup", "ensemble"):
        recipe = Recipe(kind, candidate="live", across_seeds=False)
        combine([tmp_path / "runs" / n for n in "ab"], recipe, [f"name={kind}"])
    run = load_run(tmp_path / "runs" / "soup" / "45" / "0")
    assert run.candidate == "soup"
    assert run.name == "uniform soup of live, hold out 45, seed 0"
    recorded = [run.scores[f"45/{part}"] for part in ("in", "out")]
    n = sum(part["n"] for part in recorded)
    wanted = sum(part["accuracy"] * part["n"] for part in recorded) / n
    assert _accuracy(run, digits, "45") == pytest.approx(wanted, abs=1e-9)
    text = model_card(run, None, [])
    assert "rule: uniform" in text
    assert "run: a" in text
    with refuses("ensemble", "a/0 b/0", "dgavg predict"):
        load_run(tmp_path / "runs" / "ensemble" / "45" / "0")
    shutil.rmtree(tmp_path / "runs" / "a")
    with refuses("soup of runs that are gone"):
        load_run(tmp_path / "runs" / "soup" / "45" / "0")


def test_folders_that_are_no_finished_run_are_refused(train, copied, tmp_path, refuses):
    with refuses("no folder", "runs/NAME/HELD-OUT/SEED"):
        load_run(tmp_path / "nowhere")
    with refuses("is no run", "one of the 1 in it", str(copied)):
        load_run(tmp_path / "runs")
    (tmp_path / "empty").mkdir()
    with refuses("is no run", "runs/NAME/HELD-OUT/SEED"):
        load_run(tmp_path / "empty")
    (copied / "done").unlink()
    with refuses("has not ended"):
        load_run(copied)


def test_candidates_without_weights_are_refused_with_those_there_are(train, refuses):
    with refuses("'emma'", "did you mean 'ema'", "live, ema"):
        load_run(train(), "emma")


def test_damaged_and_foreign_weights_are_refused(train, copied, refuses):
    path = copied / "weights" / "ema.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with refuses("ema.safetensors", "damaged"):
        load_run(copied, "ema")
    shutil.copy(train(model__width=8) / "weights" / "ema.safetensors", path)
    with refuses("does not fit the model"):
        load_run(copied, "ema")
    shutil.rmtree(copied / "weights")
    with refuses("no weights"):
        load_run(copied)


def test_runs_of_other_kinds_of_models_and_of_old_versions_are_refused(copied, refuses):
    config = OmegaConf.load(copied / "config.yaml")
    OmegaConf.save({**config, "model": {"name": "mine", "layers": "0a"}}, copied / "config.yaml")
    with refuses("'mine'", "function"):
        load_run(copied)
    OmegaConf.save({k: config[k] for k in config if k != "dataset"}, copied / "config.yaml")
    with refuses("older dgavg"):
        load_run(copied)
