"""Runs that leave two domains out, and leave-one-domain-out cross-validation over them."""

from __future__ import annotations

import pytest
import torch

from dgavg import UserError
from dgavg.benchmark.folder import read_config
from dgavg.benchmark.members import find_members
from dgavg.benchmark.reading import read_runs
from dgavg.benchmark.table import Table


@pytest.fixture
def trained(train):
    """Every fold and every pair of one small data set."""
    return train("ema_basic", holdout="pairs", name="r")


def test_each_domain_is_left_out_alone_and_with_each_other(trained):
    _, folder = trained
    found = sorted(str(p.parent.relative_to(folder / "r")) for p in folder.rglob("done"))
    assert found == ["d0+d1/0", "d0+d2/0", "d0/0", "d1+d2/0", "d1/0", "d2/0"]
    config = read_config(folder / "r" / "d0+d2" / "0")
    assert (config["held_out"], config["held_out_with"]) == ("d0", "d2")


def test_both_domains_are_scored_and_only_the_third_validates(trained, records_of):
    _, folder = trained
    for record in records_of(folder / "r" / "d0+d2" / "0"):
        assert record["held_out_with"] == "d2"
        for candidate in record["candidates"].values():
            assert set(candidate["splits"]) == {"d0/in", "d2/in", "d1/out"}


def test_neither_domain_influences_a_run_that_leaves_both_out(train, make_data, weights_of):
    data = make_data([60, 70, 65])
    noisy = make_data([60, 70, 65])
    for i in (0, 2):
        noisy.domains[i].images.random_(0, 256)
    one, two = (
        train("ema_basic", d, holdout=[["d0", "d2"], "d1"], folder=f, name="r")[1] / "r/d0+d2/0"
        for f, d in (("a", data), ("b", noisy))
    )
    found = [weights_of(folder) for folder in (one, two)]
    assert all(found[0]["live"][k].equal(v) for k, v in found[1]["live"].items())


def test_cross_validation_is_the_plain_mean_over_the_other_runs(trained):
    table, folder = trained
    runs, _ = read_runs([folder])
    records = {(r[0]["held_out"], r[0].get("held_out_with")): r for r in runs["r"]}
    frame = Table(runs, "loo").to_frame().set_index(["held_out", "candidate"])
    assert set(table.to_frame()["held_out"]) == {"d0", "d1", "d2"}
    for t in ("d0", "d1", "d2"):
        scores = []
        for i in range(3):
            each = []
            for v in {"d0", "d1", "d2"} - {t}:
                pair = records[(min(t, v), max(t, v))][i]
                each.append(pair["candidates"]["ema"]["splits"][f"{v}/in"]["accuracy"])
            scores.append(sum(each) / 2)
        row = frame.loc[t, "ema"]
        assert row["step"] == 8 * (1 + max(range(3), key=lambda i: scores[i]))
        assert row["score"] == pytest.approx(max(scores))


def test_where_other_runs_decide_the_last_weights_are_kept(train, weights_of, records_of):
    table, folder = train("ema_basic", holdout="pairs", name="r", protocol__selection="loo")
    assert "left that one out, too" in str(table)
    run = folder / "r" / "d1" / "0"
    assert sorted(weights_of(run)) == ["ema", "live"]
    saved = torch.load(run / "checkpoint.pt", weights_only=True)["run"]["model"]
    assert weights_of(run)["live"]["classifier.weight"].equal(saved["classifier.weight"])


def test_runs_of_two_domains_are_in_no_soup(trained):
    _, folder = trained
    found, _ = find_members([folder], "live")
    assert sorted(member.held_out for member in found) == ["d0", "d1", "d2"]


@pytest.mark.parametrize(
    ("holdout", "message"),
    [
        ([["d0", "d1", "d2"]], "a fold is one domain or two"),
        ([["d0", "d7"]], "no domain 'd7'"),
    ],
)
def test_a_fold_that_cannot_be_is_refused(train, holdout, message):
    with pytest.raises(UserError, match=message):
        train(holdout=holdout)


def test_two_of_two_domains_leave_nothing_to_train_on(train, make_data):
    with pytest.raises(UserError, match="holdout=pairs leaves no domain of the 2 to train on"):
        train(data=make_data([60, 60]), holdout="pairs")
