"""Runs of one sweep: they may differ in how they were trained, not in what they are."""

from __future__ import annotations

import shutil

import pytest
from omegaconf import OmegaConf
from safetensors.torch import load_file
from soups import assert_close, mean_of, names, only, record_of, state

from dgavg import cli
from dgavg.benchmark.files import read_records

BASE = [
    *("trainer=basic", "model.width=8", "protocol.eval_every=10", "holdout=[0]", "seeds=[0]"),
    *("device=cpu", "data.angles=[0,30,60]", "data.size=8"),
]
SWEEP = {
    "a": ["protocol.steps=10", "protocol.batch_size=16", "model.dropout=0"],
    "b": ["protocol.steps=20", "protocol.batch_size=8", "model.dropout=0.5", "optimizer.lr=0.02"],
    "c": ["protocol.steps=10", "protocol.batch_size=8", "model.dropout=0",
          "protocol.augment=domainbed", "protocol.eval_every=5"],
}  # fmt: skip


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """`runs/a`, `runs/b`, `runs/c`, as DiWA's sweep has them."""
    top = tmp_path_factory.mktemp("sweep")
    for name, words in SWEEP.items():
        assert cli.main([*BASE, *words, f"name={name}", f"runs={top}/runs"]) == 0
    return top


@pytest.fixture
def edited(home, tmp_path):
    """`edited(**settings)`: `runs/` with a real run and its copy that says other settings."""

    def make(**settings):
        run = home / "runs" / names(home)[0] / "0/0"
        for name in ("a", "b"):
            shutil.copytree(run, tmp_path / "runs" / name / "0/0")
        path = tmp_path / "runs/b/0/0/config.yaml"
        config = OmegaConf.load(path)
        for key, value in settings.items():
            OmegaConf.update(config, key.replace("__", "."), value)
        path.write_text(OmegaConf.to_yaml(config))

    return make


@pytest.mark.parametrize("command", ["soup", "ensemble --candidate live"])
def test_what_differs_is_listed_in_config_and_record(command, dgavg, sweep, tmp_path):
    dgavg(f"{command} {sweep}/runs runs=soups")
    folder = only(tmp_path / "soups")
    one = read_records(sweep / "runs/b/0/0/records.jsonl")[-1]
    config = OmegaConf.to_container(OmegaConf.load(folder / "0/0/config.yaml"))
    for found in (record_of(folder, "0", 0), config):
        assert found["protocol"] == one["protocol"] | {
            "steps": "10, 20",
            "batch_size": "8, 16",
            "eval_every": "5, 10",
            "augment": "domainbed, none",
        }
        assert found["model"] == one["model"] | {"dropout": "0, 0.5"}


def test_the_soup_of_a_sweep_is_the_mean_of_its_runs(dgavg, sweep, tmp_path):
    dgavg(f"soup {sweep}/runs runs=soups --batchnorm average")
    states = [load_file(sweep / f"runs/{x}/0/0/weights/live.safetensors") for x in SWEEP]
    found = load_file(only(tmp_path / "soups") / "0/0/weights/soup.safetensors")
    assert_close(found, mean_of(states))


def test_runs_of_other_protocols_and_their_soup_have_tables_of_their_own(dgavg, sweep, tmp_path):
    shutil.copytree(sweep / "runs", tmp_path / "runs")
    out, _ = dgavg("soup --name mine")
    headers = [line for line in out.splitlines() if line.startswith("protocol")]
    assert headers == [
        "protocol quick: 10 steps, 16 images a domain, 1 seed",
        "protocol quick: 20 steps, 8 images a domain, 1 seed",
        "protocol quick: 10 steps, 8 images a domain, 1 seed",
        "protocol quick: 10, 20 steps, 8, 16 images a domain, 1 seed",
    ]
    rows = [line.split()[0] for line in out.splitlines() if " soup " in line or " live " in line]
    assert [row for row in rows if row != "chain"] == ["basic", "basic", "basic", "uniform"]
    assert "X" not in out
    assert out.count(" against its runs\n") == 1  # in the other tables
    again, _ = dgavg("report")
    assert sorted(again.split("\n\n")) == sorted(out.split("\n\n"))


def test_the_order_of_a_sweep_makes_no_difference(dgavg, sweep, tmp_path):
    a, b, c = (f"{sweep}/runs/{name}" for name in SWEEP)
    dgavg(f"soup {a} {b} {c} runs=soups")
    before = state(tmp_path / "soups")
    dgavg(f"soup {c} {b} {a} runs=soups")
    assert state(tmp_path / "soups") == before


def test_a_sweep_over_dropout_alone_shares_one_table(dgavg, edited, tmp_path):
    edited(model__dropout=0.5)
    path = tmp_path / "runs/b/0/0/records.jsonl"  # they repeat the settings
    path.write_text(path.read_text().replace('"dropout": 0.0', '"dropout": 0.5'))
    out, _ = dgavg("soup --name mine")
    assert out.count("against live") == 1
    assert "\nuniform soup of live model.dropout=0.0, 0.5" in out
    assert "\nema_basic model.dropout=0.5" in out


@pytest.mark.parametrize(
    ("setting", "value"),
    [("steps", 7), ("batch_size", 7), ("eval_every", 7), ("augment", "domainbed")],
)
def test_how_runs_were_trained_may_differ(setting, value, dgavg, edited, tmp_path):
    edited(**{f"protocol__{setting}": value})
    dgavg("soup --name mine")
    mine = record_of(tmp_path / "runs/mine", "0", 0)["protocol"]
    assert str(value) in mine[setting].split(", ")
    assert [key for key in mine if isinstance(mine[key], str) and "," in mine[key]] == [setting]


@pytest.mark.parametrize(
    ("key", "value", "here"),
    [
        ("protocol.name", "other", "quick"),
        ("protocol.holdout_fraction", 0.3, "0.2"),
        ("protocol.test_split", "all", "in"),
        ("protocol.selection", "last", "validation"),
        ("model.depth", 3, "2"),
        ("model.batchnorm", False, "True"),
        ("data.content", "0", None),
    ],
)
def test_splits_scores_models_and_data_may_not_differ(key, value, here, dgavg, edited, tmp_path):
    edited(**{key.replace(".", "__"): value})
    before = state(tmp_path)
    for command in ("soup", "ensemble --candidate live"):
        _, error = dgavg(command, status=2)
        part = key.partition(".")[0]
        assert error.startswith(f"dgavg: b and a differ in {part} ({key}={here or ''}")
        what = "a soup" if command == "soup" else "an ensemble"
        assert f" there, {value} here): {what} is of runs that share it" in error
        assert error.count("\n") == 1
    assert state(tmp_path) == before


def test_a_setting_that_one_run_does_not_have_is_listed_as_none(dgavg, edited, tmp_path):
    edited()
    path = tmp_path / "runs/b/0/0/config.yaml"
    path.write_text(path.read_text().replace("  augment: none\n", ""))
    dgavg("soup --name mine")
    assert record_of(tmp_path / "runs/mine", "0", 0)["protocol"]["augment"] == "None, none"


@pytest.mark.parametrize("holdout", ["0/0", "30/1"])
def test_a_soup_is_never_put_into_a_trained_run(holdout, dgavg, home, tmp_path):
    a, b, _ = names(home)
    shutil.copytree(home / f"runs/{a}/{holdout}", tmp_path / f"runs/mine/{holdout}")
    before = state(tmp_path)
    words = f"{home}/runs/{a}/0/0 {home}/runs/{b}/0/0 runs=runs --name mine"
    for command in ("soup", "ensemble --candidate live"):
        _, error = dgavg(f"{command} {words}", status=2)
        assert error == "dgavg: runs/mine holds a trained run: choose another name=...\n"
    assert state(tmp_path) == before


def test_runs_without_validation_data_make_uniform_soups_alone(dgavg, tmp_path):
    for rate in (0.01, 0.02):
        words = ["protocol.steps=10", "protocol.holdout_fraction=0", "protocol.selection=last"]
        dgavg(" ".join([*BASE, *words, f"optimizer.lr={rate}", f"name=r{rate}"]))
    for rule in ("greedy", "restricted", "learned"):
        _, error = dgavg(f"soup --rule {rule} --name mine", status=2)
        assert error == (
            f"dgavg: --rule {rule}: the runs left no validation data (protocol.holdout_fraction=0) "
            "to choose by; write --rule uniform\n"
        )
    assert not (tmp_path / "runs/mine").exists()
    for words in ("soup --name s", "ensemble --candidate live --name e"):
        dgavg(words)
    assert record_of(tmp_path / "runs/s", "0", 0)["candidates"]["soup"]["splits"].keys() == {"0/in"}
