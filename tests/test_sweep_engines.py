"""Other engines: submitit's local executor, Slurm, Optuna, and plugins that are not there."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil

import pytest
from sweeps import SMALL, dgavg, records, weights

TWO = ["trainer=basic", "holdout=[0,45]", "seed=0", *SMALL]
OPTUNA = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.sampler.seed=0"]


def test_submitit_leaves_what_one_process_leaves(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    words = ["-m", *TWO, "holdout=[45]"]
    words.remove("holdout=[0,45]")
    table, _ = dgavg(tmp_path / "here", *words)
    out, error = dgavg(tmp_path / "jobs", "hydra/launcher=submitit_local", *words)
    assert out == table
    assert error.splitlines()[0] == "1 run on submitit_local, each a job of its own"
    assert records(tmp_path / "jobs") == records(tmp_path / "here")
    assert weights(tmp_path / "jobs") == weights(tmp_path / "here")
    assert not (tmp_path / "jobs/runs/.sweeps").exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("sbatch") is None, reason="no Slurm on this machine")
def test_slurm_leaves_what_one_process_leaves_and_lists_what_failed(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    words = ["-m", *TWO, "device=cpu"]
    table, _ = dgavg(tmp_path / "here", *words)
    small = [f"hydra.launcher.{x}" for x in ("gpus_per_node=0", "cpus_per_task=1", "mem_gb=2")]
    folder = tmp_path / "jobs"
    both = ["trainer=basic,irm_basic", *words[2:]]  # IRM's penalty begins past the end
    out, error = dgavg(folder, "-m", "hydra/launcher=slurm", *small, *both, status=2)
    assert out.endswith(table)  # without accounting submitit warns
    lines = error.splitlines()
    assert lines[0] == "4 runs on slurm, each a job of its own"
    assert sum(line.startswith("  again: dgavg trainer=irm_basic") for line in lines) == 2
    assert records(folder) == records(tmp_path / "here")
    assert weights(folder) == weights(tmp_path / "here")
    assert not (folder / "runs/.sweeps").exists()


def test_slurm_is_a_preset_and_its_absence_one_line(tmp_path, monkeypatch):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    monkeypatch.setenv("PATH", str(tmp_path))  # where there is no srun
    _, error = dgavg(tmp_path, "-m", "hydra/launcher=slurm", *TWO, status=2)
    assert error.splitlines()[-1].startswith("dgavg: hydra/launcher=slurm: ")
    assert "srun" in error
    assert not (tmp_path / "runs/.sweeps").exists()


@pytest.mark.parametrize(
    "range_",
    [
        "optimizer.lr=tag(log,interval(1e-4,1e-1))",
        'hydra.sweeper.params={optimizer.lr: "tag(log,interval(1e-4,1e-1))"}',
    ],
)
def test_optuna_maximizes_validation_accuracy(range_, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    out, error = dgavg(tmp_path, "-m", *OPTUNA, *TWO, range_)
    assert len(re.findall(r"^basic optimizer.lr=\S+ +live", out, re.MULTILINE)) == 3
    assert len(error.splitlines()) == 6
    *_, line, command = out.splitlines()
    scores = {}
    for path, lines in records(tmp_path / "runs").items():
        best = max(_validation(record) for record in lines)
        name = path.partition("/")[0]
        scores.setdefault(name, []).append((best, lines[0]["optimizer"]["lr"]))
    means = {each[0][1]: sum(score for score, _ in each) / 2 for each in scores.values()}
    assert len(means) == 3
    top = max(means, key=means.get)
    assert line == f"best: {100 * means[top]:.1f} % on validation data, by"
    words = shlex.split(command)
    assert words[0] == "dgavg"
    assert f"optimizer.lr={top}" in words
    _, error = dgavg(tmp_path, *words[1:])
    assert error.count("(done before)") == 2
    assert "hydra" not in command


def _validation(record):
    splits = record["candidates"]["live"]["splits"]
    out = [v["accuracy"] for k, v in splits.items() if k.endswith("/out")]
    assert f"{record['held_out']}/out" not in splits
    return sum(out) / len(out)


def test_a_trial_that_fails_stops_no_other(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    words = [*OPTUNA[:2], "hydra/sweeper/sampler=grid", *TWO, "optimizer.lr=choice(1e-2,1e30)"]
    out, error = dgavg(tmp_path, "-m", *words, status=2)
    assert "best: " in out
    assert " optimizer.lr=0.01 " in out
    assert error.count("  again: dgavg optimizer.lr=1e+30 ") == 2
    assert error.splitlines()[-1].startswith("dgavg: 2 failed")
    assert "Failed experiment" not in error


def test_optuna_never_sees_the_held_out_domain(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    words = [*OPTUNA, *TWO, "optimizer.lr=interval(1e-4,1e-1)", "protocol.selection=oracle"]
    _, error = dgavg(tmp_path, "-m", *words, status=2)
    assert error == (
        "dgavg: protocol.selection=oracle reads the held-out domain, which settings must not be "
        "tuned on: write protocol.selection=validation\n"
    )


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("hydra/launcher=jobli", "no hydra/launcher 'jobli'; did you mean 'joblib'? Known: "),
        ("hydra/sweeper=optun", "no hydra/sweeper 'optun'; did you mean 'optuna'? Known: "),
    ],
)
def test_an_engine_that_nobody_knows_is_one_line(word, said, tmp_path):
    _, error = dgavg(tmp_path, "-m", word, *TWO, status=2)
    assert error.startswith(f"dgavg: {said}")
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_an_engine_that_is_not_installed_is_one_line(tmp_path):
    if importlib.util.find_spec("hydra_plugins.hydra_ray_launcher"):
        pytest.skip("it is installed here")
    _, error = dgavg(tmp_path, "-m", "hydra/launcher=ray", *TWO, status=2)
    assert error == 'dgavg: hydra/launcher=ray is not installed: pip install "dgavg[ray]"\n'


@pytest.mark.slow
def test_ray_leaves_what_one_process_leaves(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="brings 40 packages: dgavg[ray]")
    table, _ = dgavg(tmp_path / "here", "-m", *TWO)
    words = ["hydra/launcher=ray", "+hydra.launcher.ray.init.num_cpus=2"]
    assert dgavg(tmp_path / "jobs", "-m", *words, *TWO)[0] == table
    assert records(tmp_path / "jobs") == records(tmp_path / "here")


def test_a_launcher_has_no_stacks_to_train(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    _, error = dgavg(tmp_path, "-m", "hydra/launcher=joblib", "stack=2", *TWO, status=2)
    assert "hydra/launcher=joblib makes each run a job of its own: write stack=1" in error
    assert not list((tmp_path / "runs").rglob("config.yaml"))


def test_stacks_of_several_chains_make_one_table(tmp_path):
    words = ["-m", "trainer=basic,ema_basic", "holdout=[0,45]", "seed=0", *SMALL, "stack=2"]
    out, error = dgavg(tmp_path, *words)
    assert len(re.findall(r"^(?:ema_)?basic +live", out, re.MULTILINE)) == 2
    assert len(re.findall(r"for 2 at once", error)) == 4
    again, error = dgavg(tmp_path, *words)
    assert again == out
    assert error.count("done before") == 4
