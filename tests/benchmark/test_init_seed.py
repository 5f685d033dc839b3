"""One start for many seeds: `init_seed` fixes the initial weights and nothing else."""

from __future__ import annotations

import pytest
import torch

from dgavg import Trainer, trainer
from dgavg.benchmark.folder import read_config
from dgavg.models import build_model


@pytest.fixture
def seen(train):
    """`seen(seed, init_seed)`: initial weights, first draws and batches of a run."""
    found = []

    @trainer("peek")
    class Peek(Trainer):
        """Notes what a run begins with."""

        def setup(self, run):
            weights = {k: v.clone() for k, v in run.live.items()}
            found.append({"weights": weights, "draws": torch.rand(3), "batches": []})

        def prepare(self, run, batch):
            found[-1]["batches"].append(batch.x.clone())
            return self.inner.prepare(run, batch)

    def run(seed, init_seed):
        given = {} if init_seed is None else {"init_seed": init_seed}
        train("peek_basic", seeds=[seed], steps=3, folder=f"{len(found)}", **given)
        return found[-1]

    return run


def same(a, b):
    return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


def test_runs_of_all_seeds_begin_with_the_same_bits(seen):
    one, two = seen(0, 5), seen(1, 5)
    assert same(one["weights"], two["weights"])
    assert not same(one["weights"], seen(0, 6)["weights"])


def test_batches_and_draws_are_still_the_seeds_own(seen):
    plain, fixed, other = seen(3, None), seen(3, 5), seen(4, 5)
    assert all(a.equal(b) for a, b in zip(plain["batches"], fixed["batches"], strict=True))
    assert not fixed["batches"][0].equal(other["batches"][0])
    assert not fixed["draws"].equal(other["draws"])
    assert fixed["draws"].equal(seen(3, 6)["draws"])


def test_without_it_the_weights_are_drawn_from_the_seed_as_ever(seen):
    torch.manual_seed(3)
    model = build_model("mlp", (1, 8, 8), 3, width=16)
    draws = torch.rand(3)
    found = seen(3, None)
    assert same(found["weights"], model.state_dict())
    assert found["draws"].equal(draws)
    assert same(found["weights"], seen(0, 3)["weights"])  # init_seed=3 names the same start


def test_it_is_part_of_what_a_run_is(train, records_of, tmp_path):
    for init_seed in (None, 0):
        given = {} if init_seed is None else {"init_seed": init_seed}
        train("basic", folder="runs", **given)
    runs = sorted(p.parent for p in tmp_path.rglob("done"))
    assert len(runs) == 2
    configs = [read_config(run) for run in runs]
    assert sorted(c.get("init_seed", -1) for c in configs) == [-1, 0]
    for run, config in zip(runs, configs, strict=True):
        found = records_of(run)[-1]
        assert found.get("init_seed", -1) == config.get("init_seed", -1)


def test_runs_without_it_are_those_of_before_it_was_there(train, only_run):
    """Their names and settings say nothing of it, so that finished runs are found again."""
    _, folder = train("basic")
    assert "init_seed" not in read_config(only_run(folder))


def test_a_table_tells_two_starts_apart(train):
    from dgavg.benchmark.reading import read_runs
    from dgavg.benchmark.table import Table

    for init_seed in (5, 6):
        _, folder = train("basic", init_seed=init_seed)
    text = str(Table(read_runs([folder])[0]))
    assert "basic init_seed=5 " in text
    assert "basic init_seed=6 " in text
