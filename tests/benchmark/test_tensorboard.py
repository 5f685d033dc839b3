"""`logger=tensorboard`: each number of the records once, also after a kill."""

from __future__ import annotations

import pytest

pytest.importorskip("tensorboard")

WORDS = [
    *(
        "trainer=ema_irm_basic",
        "trainer.irm.anneal=30",
        "model.width=16",
        "protocol.steps=60",
        "protocol.eval_every=20",
    ),
    *("holdout=[0]", "seeds=[0]", "logger=tensorboard"),
]


def scalars(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {
        tag: [(e.step, pytest.approx(e.value, rel=1e-6)) for e in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def wanted(records):
    found = {}
    for record in records:
        for name, value in record["losses"].items():
            found.setdefault(f"loss/{name}", []).append((record["step"], value))
        for name, candidate in record["candidates"].items():
            for split, score in candidate["splits"].items():
                key = f"{name}/{split}"
                found.setdefault(key, []).append((record["step"], score["accuracy"]))
    return found


@pytest.fixture(scope="module")
def logged(tmp_path_factory, run_and_kill):
    top = tmp_path_factory.mktemp("logged")
    kills = {
        "step": ["step", 30],
        "before the checkpoint": ["write", "checkpoint.pt", 2],
        "after the checkpoint": ["renamed", "checkpoint.pt", 2],
    }
    ends, errors = run_and_kill(
        [(top / name, WORDS, at) for name, at in kills.items()]
        + [(top / name, WORDS, None) for name in ["whole", *kills]]
    )
    assert ends == [-9] * 3 + [0] * 4, errors
    return top


@pytest.mark.parametrize("name", ["whole", "step", "before the checkpoint", "after the checkpoint"])
def test_event_files_hold_the_records_and_nothing_twice(name, logged, only_run, records_of):
    run = only_run(logged / name)
    assert scalars(run) == wanted(records_of(run))
    assert {"loss/total", "loss/risk/15", "loss/term/irm", "ema/0/in", "live/15/out"} <= set(
        scalars(run)
    )
