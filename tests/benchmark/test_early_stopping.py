"""Early stopping under a chain: where the records say, and so again after a kill."""

from __future__ import annotations

import pytest

STEPS, EVERY, PATIENCE = 400, 10, 2
WORDS = [
    "trainer=ma_ema_irm_basic",
    "trainer.irm.anneal=20",
    "trainer.ema.decay=0.9",
    "model.width=24",
    "optimizer.lr=0.03",
    f"protocol.steps={STEPS}",
    f"protocol.eval_every={EVERY}",
    "stopping.candidate=ema",
    f"stopping.patience={PATIENCE}",
    "holdout=[15]",
    "seeds=[0]",
]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, run_and_kill):
    """An uninterrupted run, and two that were killed: after evaluation 2, and after the last."""
    top = tmp_path_factory.mktemp("stopped")
    kills = {"early": ["renamed", "checkpoint.pt", 2], "late": ["write", "done", 1]}
    ends, errors = run_and_kill(
        [(top / name, WORDS, at) for name, at in kills.items()]
        + [(top / name, WORDS, None) for name in ["whole", *kills]]
    )
    assert ends == [-9, -9, 0, 0, 0], errors
    return top


def test_it_stops_where_a_plain_computation_from_the_records_says(stopped, only_run, records_of):
    best, since, wanted = float("inf"), 0, None
    records = records_of(only_run(stopped / "whole"))
    for record in records:
        splits = record["candidates"]["ema"]["splits"]
        outs = [splits[f"{domain}/out"]["loss"] for domain in ("0", "30", "45", "60", "75")]
        loss = sum(outs) / len(outs)
        best, since = (loss, 0) if loss < best else (best, since + 1)
        if since == PATIENCE and wanted is None:
            wanted = record["step"]
    assert wanted == records[-1]["step"] < STEPS


@pytest.mark.parametrize("name", ["early", "late"])
def test_a_killed_run_stops_at_the_same_step_with_the_same_bits(
    name, stopped, only_run, content_of
):
    assert content_of(only_run(stopped / name)) == content_of(only_run(stopped / "whole"))
