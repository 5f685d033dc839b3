"""What a run leaves behind: its folder, its records, its weights; and when it is not run again."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from filelock import FileLock
from omegaconf import OmegaConf
from safetensors.torch import load_file

from dgavg import Trainer, UserError, leave_one_domain_out, trainer
from dgavg.benchmark.files import load_checkpoint, save_checkpoint
from dgavg.data import make_splits
from dgavg.evaluation import selected_step
from dgavg.models import build_model
from dgavg.trainers import IRM, Basic

CHAIN = "sma_ema_swa_irm_basic"
SETTINGS = {
    "trainer.irm.anneal": 5,
    "trainer.sma.start": 4,
    "trainer.sma.batchnorm": "keep",
    "trainer.swa.start": 6,
    "optimizer.lr": 0.02,
}


def state(folder):
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def test_a_run_folder_holds_what_the_design_says(train, only_run):
    _, folder = train(CHAIN, **SETTINGS)
    run = only_run(folder)
    assert run.relative_to(folder).parts[1:] == ("d1", "0")
    found = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    weights = {f"weights/{name}.safetensors" for name in ("live", "sma", "ema", "swa")}
    files = {"config.yaml", "environment.json", "records.jsonl", "checkpoint.pt", "done", ".lock"}
    assert found == files | weights


def test_config_yaml_has_every_setting_resolved(train, only_run):
    _, folder = train(CHAIN, **SETTINGS)
    config = OmegaConf.to_container(OmegaConf.load(only_run(folder) / "config.yaml"))
    assert list(config["trainer"]) == CHAIN.split("_")
    assert config["trainer"]["sma"] == {"start": 4.0, "every": 1, "batchnorm": "keep"}
    assert config["optimizer"]["lr"] == 0.02
    assert (config["held_out"], config["seed"]) == ("d1", 0)
    assert config["protocol"]["steps"] == 24


def test_every_record_names_all_that_its_numbers_come_from(train, only_run):
    _, folder = train(CHAIN, **SETTINGS)
    run = only_run(folder)
    records = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    config = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    assert [r["step"] for r in records] == [8, 16, 24]
    for record in records:
        assert record["chain"] == CHAIN
        assert list(record["trainer"]) == CHAIN.split("_")
        for part in ("trainer", "data", "model", "optimizer", "protocol", "stopping", "precision"):
            assert record[part] == config[part], part
        assert (record["held_out"], record["seed"], record["lr"]) == ("d1", 0, 0.02)
        assert {"total", "risk/d0", "risk/d2", "term/irm"} == record["losses"].keys()
        assert list(record["timing"]) == ["seconds"]
        policies = {k: c["batchnorm"] for k, c in record["candidates"].items()}
        wanted = {"live": "keep", "sma": "keep", "ema": "average", "swa": "recalibrate"}
        assert policies == {k: v for k, v in wanted.items() if k in policies}
        for candidate in record["candidates"].values():
            sizes = {split: score["n"] for split, score in candidate["splits"].items()}
            assert sizes == {"d0/out": 12, "d1/in": 56, "d2/out": 13}
    assert list(records[-1]["candidates"]) == ["live", "sma", "ema", "swa"]


def test_evaluate_all_scores_every_part_of_every_domain(train, only_run, records_of):
    _, folder = train(evaluate="all")
    splits = records_of(only_run(folder))[-1]["candidates"]["ema"]["splits"]
    assert list(splits) == [f"d{i}/{part}" for i in range(3) for part in ("in", "out")]


@pytest.mark.parametrize("rule", ["validation", "last", "oracle"])
def test_weight_files_hold_what_was_scored_at_the_selected_step(rule, train, make_data, records_of):
    data = make_data([60, 70, 65])
    settings = {**SETTINGS, "protocol.selection": rule}
    table, folder = train(CHAIN, data, steps=40, **settings)
    (run,) = (path.parent for path in folder.rglob("done"))
    records = records_of(run)
    keys = torch.from_numpy(make_splits(data, 0.2, trial_seed=0).in_[1])
    images, labels = data.domains[1].images[keys] / 255, data.domains[1].labels[keys]
    chosen = dict(zip(table.to_frame()["candidate"], table.to_frame()["step"], strict=True))
    for name in ("live", "sma", "ema", "swa"):
        model = build_model("mlp", (1, 8, 8), 3, width=16).eval()
        model.load_state_dict(load_file(run / "weights" / f"{name}.safetensors"))
        record = records[selected_step(records, name, rule)]
        score = record["candidates"][name]["splits"]["d1/in"]
        with torch.no_grad():
            logits = model(images)
        right = (logits.argmax(dim=1) == labels).sum().item()
        loss = torch.nn.functional.cross_entropy(logits, labels).item()
        assert right == round(score["accuracy"] * score["n"])
        assert loss == pytest.approx(score["loss"], rel=1e-5)
        assert chosen[name] == record["step"]


def test_a_finished_run_is_read_and_its_files_are_left_alone(train):
    first, folder = train()
    before = state(folder)
    second, _ = train()
    assert state(folder) == before
    assert str(second) == str(first)


def test_a_finished_run_is_skipped_even_where_another_process_holds_its_lock(train, only_run):
    _, folder = train()
    with FileLock(only_run(folder) / ".lock"):
        assert len(train()[0].results) == 3  # live, ema, selected


def test_the_same_seed_gives_the_same_bits_in_another_folder(train, only_run, content_of):
    chain = "ma_ema_mixup_basic"
    a, b = (only_run(train(chain, folder=name)[1]) for name in ("a", "b"))
    assert content_of(a) == content_of(b)


def test_another_seed_gives_other_weights(train, only_run, weights_of):
    one, two = (only_run(train(folder=str(seed), seeds=[seed])[1]) for seed in (0, 1))
    assert not torch.equal(
        weights_of(one)["live"]["classifier.weight"], weights_of(two)["live"]["classifier.weight"]
    )


def test_another_seed_starts_from_other_weights(train, only_run, weights_of):
    still = {"steps": 1, "optimizer__lr": 1e-12}  # so that data can't tell the two apart
    one, two = (
        only_run(train("basic", folder=str(seed), seeds=[seed], **still)[1]) for seed in (0, 1)
    )
    first, second = (weights_of(run)["live"]["classifier.weight"] for run in (one, two))
    assert not torch.allclose(first, second, atol=1e-3)


def test_the_batch_size_of_recalibration_is_part_of_a_runs_identity(train):
    _, folder = train()
    train(eval_batch_size=16)
    assert len(list(folder.iterdir())) == 2


def test_training_leaves_the_callers_threads_alone(train):
    torch.set_num_threads(2)
    train(threads=1)
    assert torch.get_num_threads() == 2


def test_one_name_for_two_settings_is_refused_and_the_difference_named(train, only_run):
    _, folder = train(name="mine")
    before = state(folder)
    with pytest.raises(UserError) as caught:
        train(name="mine", optimizer__lr=0.5)
    run = only_run(folder)
    assert str(caught.value) == (
        f"{run} holds a run with other settings (optimizer.lr=0.01 there, 0.5 here): choose "
        "another name=..., or delete that folder"
    )
    assert state(folder) == before


def test_of_many_differences_the_first_three_are_named(train):
    train(name="mine")
    with pytest.raises(UserError) as caught:
        train(name="mine", steps=30, every=10, optimizer__lr=0.5, optimizer__weight_decay=0.1)
    assert str(caught.value).count(" there, ") == 3


def test_a_run_of_several_processes_goes_on_under_torchrun_alone(train, only_run):
    _, folder = train(name="mine")
    with (only_run(folder) / "config.yaml").open("a") as config:
        config.write("processes: 2\n")
    with pytest.raises(UserError, match=r"on 2 processes, here 1: .* torchrun --nproc-per-node 2"):
        train(name="mine")


def test_two_models_of_one_name_are_two_experiments(train, make_data, tmp_path):
    data = make_data([60, 70, 65])
    folders = set()
    for width in (4, 8):
        leave_one_domain_out(
            "basic",
            data,
            model=lambda shape, classes, w=width: build_model("mlp", shape, classes, width=w),
            settings={"protocol.steps": 5},
            seeds=[0],
            holdout=["d0"],
            runs=tmp_path / "runs",
            quiet=True,
        )
        folders = {p.name for p in (tmp_path / "runs").iterdir()}
    assert len(folders) == 2


@pytest.mark.parametrize("word", ["a/b", ".", ".."])
def test_a_name_that_is_no_folder_name_is_refused(word, train, tmp_path):
    with pytest.raises(UserError, match="not a folder name"):
        train(name=word)
    assert not (tmp_path / "runs").exists()


def test_a_run_goes_on_with_the_threads_it_began_with(train, only_run, monkeypatch):
    """Sums depend on how they are split over threads."""
    _, folder = train(threads=1)
    (only_run(folder) / "done").unlink()
    checkpoint = only_run(folder) / "checkpoint.pt"
    saved = load_checkpoint(checkpoint)
    assert saved["threads"] == 1
    save_checkpoint(checkpoint, {**saved, "threads": 2})
    seen = []
    monkeypatch.setattr(
        "dgavg.benchmark.fold.fit", lambda run, **watchers: seen.append(torch.get_num_threads())
    )
    train()
    assert seen == [2]


@pytest.mark.parametrize(
    ("weight", "name"), [(lambda t: 0.1 * t, "<lambda>"), (partial(pow, 2.0), "<partial>")]
)
def test_a_function_without_a_name_of_its_own_is_refused(weight, name, train, tmp_path):
    with pytest.raises(UserError, match=rf"trainer\.irm\.weight is .*{name}: records could not"):
        train(IRM(Basic(), weight=weight))
    assert not (tmp_path / "runs").exists()


def test_a_text_with_an_angle_bracket_is_no_function(train):
    @trainer("quotes")
    class Quotes(Trainer):
        """Has a text for a setting."""

        text: str = ""

    table, _ = train(Quotes(Basic(), text="a < b"))
    assert len(table.to_frame()) == 1
