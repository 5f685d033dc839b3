"""The commands: train, multirun, list, report, help."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import yaml

from dgavg import cli
from dgavg.chain import known_trainers

SMALL = ["model.width=8", "protocol.steps=40", "protocol.eval_every=20", "holdout=[0,45]"]


@pytest.fixture
def dgavg(tmp_path, monkeypatch, capsys):
    """`dgavg(words)`: what it prints on standard output, and on standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DGAVG_DEBUG", raising=False)

    def run(words, *more, status=0):
        found = cli.main([*words.split(), *more])
        out, error = capsys.readouterr()
        assert found == status, error
        return out, error

    return run


def test_a_run_prints_a_line_each_and_one_table(dgavg, tmp_path):
    out, error = dgavg("trainer=ema_basic seeds=[0,1]", *SMALL)
    lines = error.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("ema_basic, hold out 0, seed 0 [1/4]: live ")
    assert lines[3].startswith("ema_basic, hold out 45, seed 1 [4/4]: live ")
    assert out.count("against live") == 1
    assert "protocol quick: 40 steps, 8 images a domain, 2 seeds" in out
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]


def test_a_second_time_every_run_is_done_before(dgavg):
    first, _ = dgavg("trainer=ema_basic seeds=[0]", *SMALL)
    second, error = dgavg("trainer=ema_basic seeds=[0]", *SMALL)
    assert second == first
    assert all(line.endswith("(done before)") for line in error.splitlines())


@pytest.mark.parametrize("words", ["--seed 7", "--seed=7", "seeds=[7]"])
def test_seed_is_short_for_a_list_of_one(words, dgavg):
    out, _ = dgavg(f"{words} --cfg job")
    assert yaml.safe_load(out)["seeds"] == [7]


def test_options_may_stand_between_settings(dgavg):
    out, _ = dgavg("seeds=[7] --cfg job optimizer.lr=0.5")
    found = yaml.safe_load(out)
    assert (found["seeds"], found["optimizer"]["lr"]) == ([7], 0.5)


def test_a_multirun_prints_one_table_of_all_chains(dgavg, tmp_path):
    out, _ = dgavg("seeds=[0,1] -m trainer=ma_basic,ema_coral_basic", *SMALL)
    assert out.count("against live") == 1
    table, difference = out.strip().split("\n\ndifference to ma_basic, paired")
    rows = [line.split()[:2] for line in table.splitlines()[6:]]
    assert [row[: 1 + (i % 3 == 0)] for i, row in enumerate(rows)] == [
        *(["ma_basic", "live"], ["ma"], ["selected"]),
        *(["ema_coral_basic", "live"], ["ema"], ["selected"]),
    ]
    assert difference.splitlines()[-1].startswith("ema_coral_basic  ")
    assert len(list((tmp_path / "runs").iterdir())) == 2  # and nothing of Hydra's
    again, _ = dgavg("report")
    assert set(table.splitlines()) <= set(again.splitlines()) | {""}


def test_a_multirun_goes_on_after_a_chain_that_fails(dgavg):
    words = "seeds=[0] -m optimizer.lr=1e30,1e-2 trainer=ema_basic"
    out, error = dgavg(words, *SMALL, status=2)
    assert "ema_basic  live" in out
    assert "dgavg: step 1: the loss of domain '15' is nan" in error
    assert "dgavg: step 1: the loss of domain '0' is nan" in error
    assert error.endswith("dgavg: 2 failed; the same command tries again what is not done\n")


def test_a_loss_that_is_not_finite_names_step_and_domain(dgavg, tmp_path):
    _, error = dgavg(
        "trainer=ema_basic seeds=[0] optimizer.lr=1e30", *SMALL[:3], "holdout=[0]", status=2
    )
    assert error == (
        "dgavg: step 1: the loss of domain '15' is nan; try a lower optimizer.lr or a smaller "
        "weight (hold out 0, seed 0; no checkpoint had been written yet)\n"
    )
    assert not list(tmp_path.rglob("done"))


def test_report_reads_what_has_ended_and_counts_the_rest(dgavg, tmp_path):
    out, _ = dgavg("trainer=ema_basic seeds=[0]", *SMALL)
    assert dgavg("report --no-html") == (out, "")
    assert dgavg("report runs runs")[0] == out  # nothing counts twice
    (one,) = (tmp_path / "runs").glob("*/0/0")
    assert dgavg(f"report {one}")[0].splitlines()[4].split()[:3] == ["chain", "candidate", "0"]
    (one / "done").unlink()
    found, error = dgavg("report runs --no-html")
    assert "45" in found.splitlines()[4]
    assert " 0 " not in found.splitlines()[4]
    assert error == "dgavg: left out 1 run(s) that have not ended\n"


def test_report_takes_another_rule(dgavg):
    dgavg("trainer=ema_basic seeds=[0] evaluate=all", *SMALL)
    assert "checkpoint: the last evaluation" in dgavg("report --rule last")[0]
    assert "HELD-OUT" in dgavg("report --rule oracle")[0]


def test_report_says_what_the_oracle_rule_is_missing(dgavg):
    dgavg("trainer=ema_basic seeds=[0]", *SMALL)
    _, error = dgavg("report --rule oracle", status=2)
    assert error.startswith("dgavg: the oracle rule reads 0/out, which this run did not score")
    assert error.count("\n") == 1


def test_report_prints_a_table_for_each_protocol(dgavg):
    for steps in (20, 40):
        dgavg("trainer=ema_basic seeds=[0]", *SMALL, f"protocol.steps={steps}")
    out, _ = dgavg("report")
    assert out.count("against live") == 2


@pytest.mark.parametrize("text", ["", "{", '{"step": 1}\n'])
def test_report_of_damaged_records_is_one_line(text, dgavg, tmp_path):
    dgavg("trainer=ema_basic seeds=[0] name=x", *SMALL)
    (tmp_path / "runs/x/45/0/records.jsonl").write_text(text)
    _, error = dgavg("report", status=2)
    path = tmp_path / "runs/x/45/0"
    assert error == (
        f"dgavg: {path}/records.jsonl is missing or damaged; delete {path} to train that run anew\n"
    )


def told(error):
    """What is wrong, where one run of two failed."""
    line, again, _ = [x for x in error.splitlines() if "(done before)" not in x]
    assert again.endswith("'holdout=[0]' seed=0")
    return line.removeprefix("dgavg: ")


@pytest.mark.parametrize("text", ["", "garbage", "a: [", "x: 1"])
def test_a_damaged_config_is_one_line(text, dgavg, tmp_path):
    dgavg("trainer=ema_basic seeds=[0] name=x", *SMALL)
    (tmp_path / "runs/x/0/0/config.yaml").write_text(text)
    _, error = dgavg("trainer=ema_basic seeds=[0] name=x", *SMALL, status=2)
    assert told(error) == (
        "runs/x/0/0/config.yaml is damaged or not of dgavg; delete runs/x/0/0 to train "
        "that run anew"
    )


def test_a_damaged_checkpoint_is_one_line(dgavg, tmp_path):
    dgavg("trainer=ema_basic seeds=[0] name=x", *SMALL)
    (tmp_path / "runs/x/0/0/done").unlink()
    (tmp_path / "runs/x/0/0/checkpoint.pt").write_bytes(b"PK")
    _, error = dgavg("trainer=ema_basic seeds=[0] name=x", *SMALL, status=2)
    assert told(error) == (
        "runs/x/0/0/checkpoint.pt is truncated or not a checkpoint of dgavg; delete it to "
        "start this run anew"
    )


def test_a_checkpoint_of_another_run_is_one_line(dgavg, tmp_path):
    dgavg("trainer=ema_basic seeds=[0] name=x", *SMALL)
    run = tmp_path / "runs/x/0/0"
    (run / "done").unlink()
    (run / "checkpoint.pt").write_bytes((tmp_path / "runs/x/45/0/checkpoint.pt").read_bytes())
    _, error = dgavg("trainer=ema_basic seeds=[0] name=x", *SMALL, status=2)
    assert told(error) == (
        "runs/x/0/0/checkpoint.pt is of a run with other settings (held_out=45 there, 0 "
        "here); delete it to start this run anew"
    )


def test_list_has_a_line_for_each(dgavg):
    lines = dgavg("list trainers")[0].strip().splitlines()[2:]
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines]
    assert sorted(row[1] for row in rows) == known_trainers()
    assert rows[0][:2] == ["basic", "basic"]
    (irm,) = [row for row in rows if row[1] == "irm"]
    assert irm == [
        "loss",
        "irm",
        "Invariant risk minimization, the IRMv1 penalty",
        "Arjovsky et al. 2019, arXiv 1907.02893",
        "no pass beyond the forward pass",
    ]
    assert re.search(r"^digits_rotated +scikit-learn's", dgavg("list data")[0], re.MULTILINE)
    assert re.search(r"^resnet18 +ResNet-18", dgavg("list models")[0], re.MULTILINE)
    assert re.search(r"^domainbed2020 +DomainBed as", dgavg("list protocols")[0], re.MULTILINE)
    assert dgavg("list zoo")[0].startswith("# Recipes")
    assert dgavg("list zoo pacs/swad")[0].startswith("pacs/swad: SWAD on PACS.\ndefaults:")


@pytest.mark.parametrize(
    ("words", "first", "settings"),
    [
        ("trainers irm", "irm: Invariant risk", ["trainer.irm.weight=100.0", "trainer.irm.anneal"]),
        ("data digits_rotated", "digits_rotated: scikit-learn", ["data.angles=[0.0,15.0", "size"]),
        ("models timm", "timm: Any timm", ["model.backbone=...", "model.weights=null"]),
        ("protocols quick", "quick: ", ["steps: 600"]),
    ],
)
def test_list_shows_the_card_of_one_with_its_settings(words, first, settings, dgavg):
    out, _ = dgavg(f"list {words}")
    assert out.startswith(first)
    assert all(setting in out for setting in settings)


def test_help_says_the_commands_and_every_setting_with_its_value(dgavg):
    out, _ = dgavg("--help")
    for word in ("report", "list", "soup", "ensemble", "-m"):
        assert f"dgavg {word} " in out
    for word in ("--cfg job", "--seed"):
        assert word in out
    assert "weight_decay: 0.0" in out
    assert "eval_batch_size: 512" in out


def test_cfg_job_prints_the_settings_and_runs_nothing(dgavg, tmp_path):
    found = yaml.safe_load(dgavg("trainer=ma_irm_basic trainer.irm.weight=3 --cfg job")[0])
    assert json.dumps(found["trainer"]["irm"]) == '{"weight": 3, "anneal": 500.0}'
    assert not any(tmp_path.iterdir())


def test_report_draws_the_table_too(dgavg, tmp_path):
    out, _ = dgavg("trainer=ema_basic seeds=[0]", *SMALL)
    assert dgavg("report --svg table.svg")[0] == out
    picture = (tmp_path / "table.svg").read_text()
    assert picture.startswith("<svg")
    shown = picture.replace("&#160;", " ")
    assert all(word in shown for word in ("ema_basic", "against live", "protocol quick: 40 steps"))


def test_a_picture_that_cannot_be_written_is_one_line(dgavg):
    dgavg("trainer=ema_basic seeds=[0]", *SMALL)
    _, error = dgavg("report --svg missing/table.svg", status=2)
    assert error.startswith("dgavg: missing/table.svg cannot be written: No such file")
    assert error.rstrip().endswith("choose another --svg FILE")


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    command = f"{sys.executable} -m dgavg --help | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("dgavg trains a chain")


def test_a_schedule_takes_the_place_of_the_one_in_an_experiment(dgavg, tmp_path):
    folder = tmp_path / "mine/experiment"
    folder.mkdir(parents=True)
    (folder / "slow.yaml").write_text(
        "# @package _global_\n"
        "defaults:\n  - override /trainer: irm_basic\n"
        "trainer: {irm: {weight: {linear: {to: 100, steps: 0.5}}}}\n"
    )
    words = "--config-dir mine experiment=slow --cfg job"
    for given, expected in (
        ("{linear: {to: 5}}", {"linear": {"to": 5}}),
        ("{cosine: {to: 5}}", {"cosine": {"to": 5}}),
        ("3", 3),
    ):
        out, _ = dgavg(words, f"trainer.irm.weight={given}")
        assert yaml.safe_load(out)["trainer"]["irm"]["weight"] == expected


def test_settings_of_a_link_given_together_keep_the_others(dgavg):
    out, _ = dgavg("trainer=irm_basic --cfg job", "trainer.irm={weight: 3}")
    assert yaml.safe_load(out)["trainer"]["irm"] == {"weight": 3, "anneal": 500.0}


def test_schedules_are_swept_over(dgavg):
    words = "-m trainer=irm_basic trainer.irm.anneal=0 protocol.steps=8 seeds=[0] holdout=[0]"
    out, _ = dgavg(words, "trainer.irm.weight={linear: {to: 5}},{cosine: {to: 5}},3")
    labels = [line.split("  ")[0] for line in out.splitlines() if line.startswith("irm_basic")]
    assert [label.partition(" irm.weight")[2] for label in labels] == [
        ".linear.to=5",
        ".cosine.to=5",
        "=3",
    ]
