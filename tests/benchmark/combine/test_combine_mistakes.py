"""Runs that cannot be combined, and mistakes: one line each, nothing written."""

from __future__ import annotations

import shutil

import pytest
import torch
from soups import names, only, record_of, state

from dgavg.models import build_model


def test_soups_lie_beside_their_runs_and_are_no_members(dgavg, home, tmp_path):
    shutil.copytree(home / "runs", tmp_path / "mine")
    dgavg("soup mine")
    dgavg("ensemble mine --candidate live")
    before = state(tmp_path / "mine")
    _, error = dgavg("soup mine")
    assert error.count("(3 runs, done before)") == 4
    assert state(tmp_path / "mine") == before
    soup = next((tmp_path / "mine").glob("uniform*"))
    _, error = dgavg(f"soup {soup}", status=2)
    assert error == f"dgavg: no finished run but soups and ensembles in {soup}\n"


def test_what_has_not_ended_is_left_out_and_counted(dgavg, home, tmp_path):
    shutil.copytree(home / "runs", tmp_path / "runs")
    a, b, c = names(home)
    (tmp_path / f"runs/{a}/0/0/done").unlink()
    (tmp_path / f"runs/{a}/30/1/done").unlink()
    (tmp_path / f"runs/{b}/30/1/done").unlink()
    _, error = dgavg("soup --name s")
    assert error.splitlines()[0] == f"hold out 30, seed 1: left out, {c} is alone there"
    assert error.splitlines()[-1] == "dgavg: left out 3 run(s) that have not ended"
    assert "hold out 0, seed 0 [1/3]: " in error
    assert error.count("(3 runs, ") == 2
    assert error.count("(2 runs, ") == 1
    assert [m["run"] for m in record_of(tmp_path / "runs/s", "0", 0)["members"]] == [b, c]
    (tmp_path / f"runs/{a}/0/0/done").touch()
    _, error = dgavg("soup --name s", status=2)  # never two soups in one folder
    last = error.splitlines()[-1]
    assert last.startswith(
        f"dgavg: {tmp_path}/runs/s/0/0 holds a run with other settings (members.{a}/0"
    )
    assert last.endswith("choose another name=..., or delete that folder")


def test_runs_that_differ_are_refused_with_the_difference(dgavg, home, tmp_path, small):
    words = [*small[1:], "trainer=ema_basic", "holdout=[0]", "seeds=[0]", "model.width=4"]
    dgavg(" ".join([*words, "name=thin"]))
    for command in ("soup", "ensemble --candidate live"):
        _, error = dgavg(f"{command} runs {{home}}/runs", status=2)
        what = "a soup" if command == "soup" else "an ensemble"
        last = error.splitlines()[-1]
        assert last == (
            f"dgavg: {names(home)[0]} and thin differ in model (model.width=4 there, 8 here): "
            f"{what} is of runs that share it; name the folders of those"
        )
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (
            "protocol.holdout_fraction=0.3",
            "differ in protocol (protocol.holdout_fraction=0.3 there",
        ),
        ("data.shuffle_seed=1", "differ in data (data.content="),
    ],
)
def test_runs_of_another_protocol_or_data_are_refused(change, shown, dgavg, home, small):
    words = [*small, "trainer=ema_basic", "holdout=[0]", "seeds=[0]", change]
    dgavg(" ".join([*words, "name=other"]))
    _, error = dgavg("soup runs {home}/runs", status=2)
    assert shown in error.splitlines()[-1]


def test_runs_of_one_seed_and_two_starts_are_refused(dgavg, home, small):
    words = [*small, "trainer=ema_basic", "holdout=[0]", "seeds=[0]", "init_seed=5", "name=other"]
    dgavg(" ".join(words))
    _, error = dgavg("soup runs {home}/runs", status=2)
    assert "began with different weights" in error.splitlines()[-1]
    assert "init_seed 5" in error.splitlines()[-1]
    dgavg("ensemble runs {home}/runs --candidate live runs=elsewhere")  # which needs no one start


def test_the_seed_itself_is_a_start_that_init_seed_can_name(dgavg, home, tmp_path, small):
    words = [*small, "trainer=basic", "holdout=[0]", "seeds=[0]", "init_seed=0", "name=other"]
    dgavg(" ".join(words))
    dgavg("soup runs {home}/runs runs=soups")
    assert len(record_of(only(tmp_path / "soups"), "0", 0)["members"]) == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("soup", "no folder runs: give one of runs, such as runs/"),
        ("soup {home}/runs nowhere", "no folder nowhere: give one of runs, such as runs/"),
        ("soup .", "no finished run in ."),
        ("soup {home}/runs --rule gredy", "no rule 'gredy'; did you mean 'greedy'? Known: uniform"),
        ("soup {home}/runs --batchnorm keep", "no batch-norm policy 'keep'; Known: recalibrate, a"),
        ("soup {home}/runs --foo", "unrecognized arguments: --foo; see dgavg soup --help"),
        ("ensemble {home}/runs --rule uniform", "unrecognized arguments: --rule uniform; see dg"),
        ("soup {home}/runs optimizer.lr=1", "optimizer.lr is as it was in the runs; here may be "
         "set: device, precision, threads, eval_batch_size, runs, name"),
        ("soup {home}/runs data.angles=[0]", "data.angles is as it was in the runs; here may be"),
        ("soup {home}/runs devise=cpu", "no setting 'devise'; did you mean 'device'? Known: "),
        ("soup {home}/runs device=gpu", "no device 'gpu'; did you mean 'cpu'? Known: auto"),
        ("soup {home}/runs precision=fp8", "precision=fp8: choose one of fp32, bf16"),
        ("soup {home}/runs threads=0", "threads=0: at least 1, or null"),
        ("soup {home}/runs eval_batch_size=0", "eval_batch_size=0: at least 1"),
        ("soup {home}/runs name=..", "name='..': not a folder name"),
        ("soup {home}/runs --name a/b", "name='a/b': not a folder name"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_leaves_nothing(words, message, dgavg, home, tmp_path):
    before = state(home)
    out, error = dgavg(words, status=2)
    assert out == ""
    assert error.startswith(f"dgavg: {message}")
    assert error.count("\n") == 1
    assert not any(tmp_path.iterdir())
    assert state(home) == before


def test_weights_that_are_not_there_are_one_line_with_those_that_are(dgavg, home, tmp_path):
    _, error = dgavg("ensemble {home}/runs", status=2)
    assert error == (
        f"dgavg: no weights of candidate 'sma' in {home}/runs/{names(home)[0]}/0/0; did you mean "
        "'ema'? Known: ema, live\n"
    )
    assert not any(tmp_path.iterdir())


def test_one_run_is_no_soup(dgavg, home, tmp_path):
    name = names(home)[0]
    _, error = dgavg(f"soup {{home}}/runs/{name} runs=soups", status=2)
    assert error == (
        "dgavg: a soup needs at least two runs of one held-out domain and seed (or "
        f"--across-seeds); here is only {name}\n"
    )
    _, error = dgavg(f"ensemble --candidate live {{home}}/runs/{name}/0/0", status=2)
    assert error == (
        "dgavg: an ensemble needs at least two runs of one held-out domain and seed; here is only "
        f"{name}\n"
    )
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["truncated", "missing shape"])
def test_damaged_weights_are_one_line(damage, dgavg, home, tmp_path):
    shutil.copytree(home / "runs", tmp_path / "runs")
    run = tmp_path / f"runs/{names(home)[1]}/0/0"
    path = run / "weights/live.safetensors"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:100])
        message = f"{path} is missing or damaged; delete {run} to train that run anew"
    else:
        path.write_bytes((home / f"runs/{names(home)[1]}/0/0/config.yaml").read_bytes())
        message = f"{path} is missing or damaged; delete {run} to train that run anew"
    _, error = dgavg("soup --name s", status=2)
    assert error == f"dgavg: {message}\n"
    assert not (tmp_path / "runs/s/0/0/done").exists()
    assert not (tmp_path / "runs/s/0/0/weights").exists()


def test_weights_of_another_model_are_one_line(dgavg, home, tmp_path):
    from safetensors.torch import save_file

    shutil.copytree(home / "runs", tmp_path / "runs")
    path = tmp_path / f"runs/{names(home)[1]}/0/0/weights/live.safetensors"
    save_file({"w": torch.ones(1)}, path)
    _, error = dgavg("soup --name s", status=2)
    assert error.startswith(f"dgavg: {path} does not fit the model of the runs: another model: ")
    assert error.count("\n") == 1


def test_threads_are_as_before(dgavg):
    torch.set_num_threads(2)
    dgavg("soup {home}/runs runs=soups threads=1")
    assert torch.get_num_threads() == 2


def test_bfloat16_scores_are_records_of_their_own(dgavg, home, tmp_path):
    dgavg("soup {home}/runs runs=soups")
    dgavg("soup {home}/runs runs=soups precision=bf16")
    records = {r["precision"]: r for r in (record_of(p, "0", 0) for p in tmp_path.glob("soups/*"))}
    assert records.keys() == {"fp32", "bf16"}
    losses = [r["candidates"]["soup"]["splits"]["0/in"]["loss"] for r in records.values()]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_pretrained_weights_need_not_be_there_any_more(dgavg, tmp_path):
    weights = tmp_path / "start.pt"
    torch.save(build_model("resnet18", (1, 8, 8), 10).state_dict(), weights)
    for rate in (0.001, 0.01):
        dgavg(
            f"trainer=basic model=resnet18 model.weights={weights} optimizer.lr={rate} "
            f"name=r{rate} data.angles=[0,30] data.size=8 protocol.steps=2 holdout=[0] seeds=[0] "
            "device=cpu"
        )
    weights.unlink()
    dgavg("soup runs --name s")
    assert record_of(tmp_path / "runs/s", "0", 0)["model"]["weights"] == str(weights)


def test_data_from_python_have_no_name_to_load_by(dgavg, train):
    for rate in (0.01, 0.03):
        train(folder="runs", optimizer__lr=rate)
    _, error = dgavg("soup runs", status=2)
    assert error.startswith("dgavg: no data set 'toy'; Known: ")
