"""A stack of runs against the same runs, one by one."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from stacked_runs import Doubled, links, parts, records, settings, sgd, side_by_side, toy

from dgavg import Run, UserError, fit
from dgavg.benchmark.campaign import run_experiments
from dgavg.benchmark.experiment import experiments
from dgavg.benchmark.stacked import run_stack, stacks
from dgavg.chain import find_trainer, known_trainers
from dgavg.config import compose, plain
from dgavg.data import Domain, DomainDataset
from dgavg.models.stack import Stack, part
from dgavg.stacked import StackedRun

STACKABLE = sorted(name for name in known_trainers() if find_trainer(name).stackable)
STEPS = {"fp32": 12, "bf16": 4, "fp64": 12}
CASES = [("mlp", name, precision) for name in STACKABLE for precision in ("fp32", "bf16")]
CASES += [("cnn", name, "fp64") for name in ("basic", "irm", "coral", "ema", "sma", "swa")]
CASES += [("cnn", "ema", "bf16"), ("resnet18", "ema", "fp64")]
CLOSE = {  # bf16 rounds losses to two or three digits: there only the first steps can be compared
    "fp32": {"rtol": 1e-3, "atol": 2e-5},
    "bf16": {"rtol": 0.1, "atol": 0.05},
    "fp64": {"rtol": 1e-6, "atol": 1e-8},
}


@pytest.mark.parametrize(("network", "name", "precision"), CASES)
def test_a_stack_trains_each_model_as_a_run_of_its_own(network, name, precision):
    dataset, steps = toy(network), {"resnet18": 2}.get(network, STEPS[precision])
    double, rate = precision == "fp64", 0.1 if network == "mlp" else 0.01

    def trained(kind, model, batches):
        run = kind(
            links(name),
            model.double() if double else model,
            Doubled(batches) if double else batches,
            steps=steps,
            optimizer=lambda parameters: sgd(parameters, rate),
            precision="fp32" if double else precision,
        )
        fit(run)
        return run

    alone = [trained(Run, model, batches) for batches, model in parts(dataset, network)]
    made = parts(dataset, network)
    batches = side_by_side(dataset, made)
    theirs = trained(StackedRun, Stack([model for _, model in made]), batches).candidates()
    close = CLOSE[precision] | ({"atol": 1e-3} if (name, precision) == ("mmd", "fp32") else {})
    for r, run in enumerate(alone):
        mine = run.candidates()
        assert mine.keys() == theirs.keys()
        for candidate, expected in mine.items():
            found = part(theirs[candidate].weights, r)
            assert theirs[candidate].batchnorm == expected.batchnorm
            assert found.keys() == expected.weights.keys()
            for key, tensor in expected.weights.items():
                torch.testing.assert_close(found[key], tensor, **close)


def test_every_kind_of_link_is_there():
    assert {"basic", "ma", "sma", "ema", "swa", "lawa", "irm", "vrex", "coral"} <= set(STACKABLE)


def test_what_looks_at_a_run_as_a_whole_is_refused():
    dataset = toy()
    made = parts(dataset)
    batches = side_by_side(dataset, made)
    stack = Stack([model for _, model in made])
    with pytest.raises(UserError, match=r"'sam' in 'sam_basic' .* stack=1"):
        StackedRun("sam_basic", stack, batches, steps=4)
    with pytest.raises(UserError, match=r"no clip=1\.0"):
        StackedRun("basic", stack, batches, steps=4, clip=1.0)
    with pytest.raises(UserError, match="no precision=fp16"):
        StackedRun("basic", stack, batches, steps=4, precision="fp16")


@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_records_and_weights_of_a_stack_are_those_of_its_runs(tmp_path, network):
    from safetensors.torch import load_file

    from dgavg.benchmark.fold import run_fold

    alone = settings(tmp_path / "alone", network=network)
    for fold, seed in itertools.product(alone.folds, alone.seeds):
        run_fold(alone, fold, seed)
    together = settings(tmp_path / "together", "stack=3", network=network)
    assert [len(members) for members in stacks(together)] == [3, 1]
    for members in stacks(together):
        run_stack(together, members)
    assert stacks(together) == []
    mine, theirs = records(together), records(alone)
    for key, lines in theirs.items():
        assert len(mine[key]) == len(lines) == 4
        for record, expected in zip(mine[key], lines, strict=True):
            assert record.pop("stack") == 3
            assert list(record) == list(expected)
            assert list(record["losses"]) == list(expected["losses"])
            assert record["losses"] == pytest.approx(expected["losses"], rel=1e-3, abs=1e-6)
            assert record["candidates"].keys() == expected["candidates"].keys()
            for name, found in record["candidates"].items():
                other = expected["candidates"][name]
                assert found["batchnorm"] == other["batchnorm"]
                assert list(found["splits"]) == list(other["splits"])
                for split, score in found["splits"].items():
                    assert score["n"] == other["splits"][split]["n"]
                    assert score["loss"] == pytest.approx(other["splits"][split]["loss"], rel=1e-3)
                    near = 2.5 / score["n"]
                    accuracy = other["splits"][split]["accuracy"]
                    assert score["accuracy"] == pytest.approx(accuracy, abs=near)
    for fold, seed in theirs:
        files = {p.name for p in (alone.run_folder(fold, seed) / "weights").iterdir()}
        assert files == {p.name for p in (together.run_folder(fold, seed) / "weights").iterdir()}
        for name in files:
            one, other = (
                load_file(e.run_folder(fold, seed) / "weights" / name) for e in (alone, together)
            )
            assert one.keys() == other.keys()
            for k in one:
                torch.testing.assert_close(other[k], one[k], rtol=1e-3, atol=1e-3)
    assert not list((together.folder / ".stacks").iterdir())


@pytest.mark.parametrize(("network", "at"), [("mlp", 7), ("mlp", 10), ("mlp", 25), ("cnn", 15)])
def test_a_stopped_stack_goes_on_to_the_bit(tmp_path, monkeypatch, network, at):
    class StopError(Exception):
        pass

    def stop(run):
        if run.t == at:
            raise StopError

    monkeypatch.setattr("dgavg.benchmark.stacked.PAUSE", 0.0)
    whole, killed = (
        settings(tmp_path / name, "stack=4", network=network) for name in ("whole", "cut")
    )
    (members,) = stacks(whole)
    run_stack(whole, members)
    with pytest.raises(StopError):
        run_stack(killed, members, stop)
    assert stacks(killed) == [members]
    run_stack(killed, members)
    assert records(killed) == records(whole)
    for fold, seed in members:
        for path in (whole.run_folder(fold, seed) / "weights").iterdir():
            other = killed.run_folder(fold, seed) / "weights" / path.name
            assert other.read_bytes() == path.read_bytes()


def test_a_stack_killed_while_it_says_done_is_taken_up_whole(tmp_path):
    experiment = settings(tmp_path, "stack=4")
    (members,) = stacks(experiment)
    seen = {}

    def stop(run):
        if run.t == run.steps:
            seen["last"] = True

    run_stack(experiment, members, stop)
    expected = records(experiment)
    assert seen
    # as it stands when the process dies between the first `done` and the second
    again = settings(tmp_path / "again", "stack=4")
    monkey = pytest.MonkeyPatch()
    written = []

    def write_text(path, text):
        if path.name == "done" and written:
            raise OSError("killed")
        written.append(path)
        path.write_text(text)

    monkey.setattr("dgavg.benchmark.stacked.write_text", write_text)
    with pytest.raises(OSError, match="killed"):
        run_stack(again, members)
    monkey.undo()
    assert stacks(again) == [members]
    run_stack(again, members)
    assert stacks(again) == []
    assert records(again) == expected


class StoppedError(Exception):
    pass


def stopped(experiment, members, at):
    def stop(run):
        if run.t == at:
            raise StoppedError

    with pytest.raises(StoppedError):
        run_stack(experiment, members, stop)


@pytest.fixture
def saving(monkeypatch):
    monkeypatch.setattr("dgavg.benchmark.stacked.PAUSE", 0.0)


def test_a_killed_stack_is_not_gone_on_with_by_other_settings(tmp_path, saving):
    first = settings(tmp_path, "stack=4", "name=x")
    (members,) = stacks(first)
    stopped(first, members, 15)
    other = settings(tmp_path, "stack=4", "name=x", "optimizer.lr=0.05")
    with pytest.raises(UserError, match=r"other settings .*optimizer\.lr.*or delete that folder"):
        run_stack(other, members)
    for fold, seed in members:
        shutil.rmtree(other.run_folder(fold, seed))
    (again,) = stacks(other)
    run_stack(other, again)
    for lines in records(other).values():
        assert {record["lr"] for record in lines} == {0.05}


KILLED = """
import os, signal, sys
from dgavg import cli
from dgavg.benchmark import stacked
from dgavg.stacked import StackedRun

stacked.PAUSE, step = 0.0, StackedRun.step

def die(self, batch):
    if self.t == 17:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch)

if sys.argv[1] == "die":
    StackedRun.step = die
sys.exit(cli.main(sys.argv[2:]))
"""


def test_a_process_that_is_killed_goes_on_to_the_bit(tmp_path):
    words = ["trainer=ema_basic", "stack=2", "holdout=[0,45]", "seeds=[0]", "model.width=8"]
    words += ["protocol.steps=30", "protocol.eval_every=10", "name=x"]

    def command(folder, how="live"):
        start = [sys.executable, "-c", KILLED, how, *words, f"runs={folder}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(start, env=environment, capture_output=True, timeout=200)

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert command(whole).returncode == 0
    assert command(cut, "die").returncode == -9
    assert len(list((cut / "x/.stacks").glob("*.pt"))) == 1
    assert not list(cut.rglob("done"))
    found = command(cut)
    assert found.returncode == 0, found.stderr
    for path in whole.rglob("*.safetensors"):
        assert (cut / path.relative_to(whole)).read_bytes() == path.read_bytes()
    for path in whole.rglob("records.jsonl"):
        mine, theirs = (
            [json.loads(line) | {"timing": 0} for line in p.read_text().splitlines()]
            for p in (cut / path.relative_to(whole), path)
        )
        assert mine == theirs


def test_a_stack_goes_on_with_as_many_threads_as_it_began_with(tmp_path, saving):
    first = settings(tmp_path, "stack=4", "threads=2")
    (members,) = stacks(first)
    stopped(first, members, 15)
    seen = []
    other = settings(tmp_path, "stack=4", "threads=1")
    run_stack(other, members, lambda run: seen.append(torch.get_num_threads()))
    assert set(seen) == {2}
    assert torch.get_num_threads() == 1


def test_to_delete_the_folder_of_one_run_trains_it_anew(tmp_path, saving):
    whole, killed = settings(tmp_path / "whole", "stack=4"), settings(tmp_path / "cut", "stack=4")
    (members,) = stacks(whole)
    run_stack(whole, members)
    stopped(killed, members, 15)
    shutil.rmtree(killed.run_folder(*members[0]))
    (again,) = stacks(killed)
    run_stack(killed, again)
    assert records(killed) == records(whole)


def test_what_is_done_is_never_written_again(tmp_path, saving):
    experiment = settings(tmp_path, "stack=4")
    (members,) = stacks(experiment)
    stopped(experiment, members, 15)
    run_stack(experiment, members[:1])  # as another command would
    folder = experiment.run_folder(*members[0])
    before = {p: p.read_bytes() for p in folder.rglob("*.*") if p.is_file()}
    assert (folder / "done").exists()
    (again,) = stacks(experiment)
    stopped(experiment, again, 25)
    run_stack(experiment, stacks(experiment)[0])
    assert {p: p.read_bytes() for p in before} == before
    assert stacks(experiment) == []
    assert len({len(lines) for lines in records(experiment).values()}) == 1


def test_a_stack_that_another_process_has_partly_done_trains_the_rest(tmp_path):
    experiment = settings(tmp_path, "stack=4")
    (members,) = stacks(experiment)
    run_stack(experiment, members[:2])
    before = records_of(experiment, members[:2])
    seen = []
    run_stack(experiment, members, lambda run: seen.append(run.count))
    assert set(seen) == {2}
    assert records_of(experiment, members[:2]) == before
    assert stacks(experiment) == []


def records_of(experiment, members):
    folders = [experiment.run_folder(*member) for member in members]
    return [(folder / "records.jsonl").read_bytes() for folder in folders]


def test_a_run_that_diverges_takes_no_other_with_it(tmp_path):
    """Where domain a is held out nothing is wrong; else a huge feature of it blows weights up."""
    random = torch.Generator().manual_seed(0)

    def domain(name, scale):
        images = scale * torch.randn(40, 6, 1, 1, generator=random)
        return Domain(name, images, torch.randint(0, 3, (40,), generator=random))

    dataset = DomainDataset(
        "toy", (domain("a", 1e20), domain("b (x)", 1.0), domain("c", 1.0)), ("x", "y", "z")
    )
    words = ["trainer=ema_basic", "model.batchnorm=false", "optimizer=sgd", "optimizer.lr=0.1"]
    more = ["protocol.steps=12", "protocol.eval_every=6", "seeds=[0]", f"runs={tmp_path}"]
    composed = plain(compose([*words, *more, "stack=3"]))
    experiment = experiments({**composed, "holdout": "all"}, dataset=dataset)
    failures = []
    runs = run_experiments(experiment, quiet=True, failures=failures)
    (lines,) = next(iter(runs.values()))
    assert {record["held_out"] for record in lines} == {"a"}
    assert set(lines[-1]["losses"]) == {"total", "risk/b (x)", "risk/c"}
    assert [one.fold for one in failures] == [("b (x)",), ("c",)]
    assert all(f"hold out {one.fold[0]}" in str(one.error) for one in failures)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optimizer.clip=1.0", r"stack=2 takes no optimizer\.clip=1\.0"),
        ("precision=fp16", "stack=2 takes no precision=fp16"),
        ("stopping.candidate=live", r"stack=2 takes no stopping\.candidate=live"),
        ("trainer=swad_basic", "'swad' in 'swad_basic' looks at a run as a whole"),
    ],
)
def test_what_a_stack_can_not_do_is_refused_before_anything_is_written(tmp_path, word, message):
    with pytest.raises(UserError, match=message):
        experiments(plain(compose(["trainer=basic", "stack=2", f"runs={tmp_path}/r", word])))
    assert not (tmp_path / "r").exists()
