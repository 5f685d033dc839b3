"""scoring=: candidates are scored in a precision of its own, and training is left alone."""

from __future__ import annotations

import json

import pytest
import torch

from dgavg.benchmark.files import load_checkpoint
from dgavg.benchmark.leave_one_out import leave_one_domain_out


def trained(folder, **settings):
    shared = {"protocol.steps": 24, "protocol.eval_every": 12, "protocol.batch_size": 20}
    leave_one_domain_out(
        "swa_ema_basic",
        seeds=[0],
        holdout=["45"],
        runs=folder,
        settings={**shared, **settings},
        quiet=True,
    )
    (path,) = folder.rglob("records.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    saved = None if settings.get("stack") else load_checkpoint(path.parent / "checkpoint.pt")
    return records, saved


def losses(records, name):
    splits = [record["candidates"][name]["splits"] for record in records]
    return [[score["loss"] for score in each.values()] for each in splits]


@pytest.mark.parametrize("stack", [1, 2])
def test_scores_are_rounded_and_training_is_not(tmp_path, stack):
    more = {"stack": stack} if stack > 1 else {}
    exact, one = trained(tmp_path / "fp32", **more)
    coarse, other = trained(tmp_path / "bf16", scoring="bf16", **more)
    assert [r["losses"] for r in exact] == [r["losses"] for r in coarse]
    assert "scoring" not in exact[0]
    assert coarse[0]["scoring"] == "bf16"
    for name in ("live", "ema", "swa"):
        for mine, theirs in zip(losses(coarse, name), losses(exact, name), strict=True):
            assert mine != theirs
            assert mine == pytest.approx(theirs, rel=0.05)
    if one is not None:
        model, twin = one["run"]["model"], other["run"]["model"]
        assert all(torch.equal(v, twin[k]) for k, v in model.items())


def test_fp32_scores_of_a_run_in_bf16_are_exact(tmp_path):
    coarse, one = trained(tmp_path / "bf16", precision="bf16")
    exact, other = trained(tmp_path / "fp32", precision="bf16", scoring="fp32")
    assert losses(coarse, "live") != losses(exact, "live")
    assert all(torch.equal(v, other["run"]["model"][k]) for k, v in one["run"]["model"].items())
