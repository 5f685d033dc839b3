"""`hparams_seed`: runs with settings drawn by a search space, and their table."""

from __future__ import annotations

import pytest

from dgavg import UserError, leave_one_domain_out
from dgavg.benchmark.folder import read_config
from dgavg.benchmark.reading import read_runs
from dgavg.benchmark.search import draw
from dgavg.benchmark.table import Table

SPACE = {
    "optimizer.lr": {"name": "lr", "log10": [-3, -1]},
    "protocol.batch_size": {"name": "batch_size", "int_log2": [2, 4]},
    "trainer.irm.weight": {"name": "irm_lambda", "log10": [-1, 1]},
    "trainer.irm.anneal": {"name": "anneal", "int_log10": [0, 4], "step": True},
}


@pytest.fixture
def drawn(tmp_path, make_data):
    def run(draw=0, space=SPACE, trainer="irm_basic", **more):
        settings = {"model.width": 8, "protocol.steps": 4, "protocol.eval_every": 2}
        settings |= {"trainer.irm.anneal": 1} if trainer == "irm_basic" else {}
        settings |= {"hparams_seed": draw, "search": space} | more
        return leave_one_domain_out(
            trainer,
            make_data([60, 60, 60]),
            settings=settings,
            seeds=[0, 1],
            holdout=["d0", "d2"],
            runs=tmp_path,
            quiet=True,
        )

    return run


def test_each_seed_trains_with_its_own_draw_in_folders_beside_the_defaults(drawn, tmp_path):
    drawn(0)
    drawn(3)
    plain, other = sorted(tmp_path.iterdir())
    assert other.name == f"{plain.name}-h3"
    for seed in (0, 1):
        wanted = draw(SPACE, 3, seed, data="toy", links=["irm", "basic"], steps=4)
        config = read_config(other / "d2" / str(seed))
        assert config["optimizer"]["lr"] == wanted["optimizer.lr"]
        assert config["protocol"]["batch_size"] == wanted["protocol.batch_size"]
        assert config["trainer"]["irm"]["weight"] == wanted["trainer.irm.weight"]
        assert config["search"]["hparams_seed"] == 3
        assert config["search"]["group"] == read_config(plain / "d0/0")["search"]["group"]
    assert read_config(plain / "d2/0")["optimizer"]["lr"] == 0.01


def test_the_table_takes_the_best_draw_of_each_cell_by_validation_alone(drawn, tmp_path):
    for i in range(6):
        drawn(i)
    runs, _ = read_runs([tmp_path])
    assert len(runs) == 6
    frame = Table(runs).to_frame()
    frame = frame[frame["candidate"] == "live"]
    assert len(frame) == 4
    for row in frame.itertuples():
        best = max(
            (score(record), each[0]["search"]["hparams_seed"])
            for group in runs.values()
            for each in group
            if (each[0]["held_out"], each[0]["seed"]) == (row.held_out, row.seed)
            for record in each
        )
        assert (row.score, row.hparams_seed) == pytest.approx(best)
    assert len({row.hparams_seed for row in frame.itertuples()}) > 1


def score(record):
    splits = record["candidates"]["live"]["splits"]
    found = [s["accuracy"] for k, s in splits.items() if k.endswith("/out")]
    return sum(found) / len(found)


def test_a_penalty_that_would_begin_past_the_end_never_does(drawn, tmp_path):
    space = {"trainer.irm.anneal": {"name": "a", "int_log10": [3, 4], "step": True}}
    drawn(1, space)
    (run,) = tmp_path.glob("*-h1")
    assert read_config(run / "d0/0")["trainer"]["irm"]["anneal"] == float("inf")


def test_a_grid_is_taken_by_index_from_one_on(drawn, tmp_path):
    grid = {"optimizer.lr": {"grid": [0.1, 0.2]}, "model.dropout": {"grid": [0.0, 0.5]}}
    drawn(2, grid, "basic")
    (run,) = tmp_path.glob("*-h2")
    config = read_config(run / "d0/0")
    assert (config["optimizer"]["lr"], config["model"]["dropout"]) == (0.1, 0.5)
    with pytest.raises(UserError, match="combination 4 of a grid that has 4"):
        drawn(5, grid, "basic")


@pytest.mark.parametrize(
    ("draw", "space", "message"),
    [
        (1, {}, "protocol 'quick' has no search space; write hparams_seed=0, or search=NAME"),
        (-1, SPACE, "hparams_seed=-1: 0 for the settings as they are"),
        (1, {"optimizer.lr": {"log20": [0, 1]}}, "search.optimizer.lr"),
        (1, {"optimizer.lt": {"name": "lr", "log10": [0, 1]}}, "no setting 'lt' in optimizer"),
    ],
)
def test_a_search_that_cannot_be_is_one_line(drawn, draw, space, message):
    with pytest.raises(UserError, match=message):
        drawn(draw, space, "basic")


def test_a_chain_made_in_python_cannot_be_drawn_for(tmp_path, make_data):
    from dgavg.trainers import Basic

    with pytest.raises(UserError, match="give both by name"):
        leave_one_domain_out(
            Basic(), make_data([60, 60, 60]), settings={"hparams_seed": 1}, runs=tmp_path
        )
