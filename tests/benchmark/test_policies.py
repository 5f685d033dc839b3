"""`also_batchnorm`: one average under several batch-norm policies, from one run."""

from __future__ import annotations

import pytest

from dgavg import UserError

BOTH = {"also_batchnorm": ["keep", "recalibrate"]}


def accuracies(records):
    return [{name: c["splits"] for name, c in record["candidates"].items()} for record in records]


def test_each_policy_scores_what_a_run_under_it_alone_does(train, only_run, records_of):
    together = accuracies(records_of(only_run(train(trainer="ema_basic", folder="a", **BOTH)[1])))
    assert list(together[0]) == ["live", "ema", "ema@keep", "ema@recalibrate"]
    for policy in ("keep", "recalibrate"):
        settings = {"trainer.ema.batchnorm": policy}
        alone = accuracies(records_of(only_run(train("ema_basic", folder=policy, **settings)[1])))
        assert [r["ema"] for r in alone] == [r[f"ema@{policy}"] for r in together]
        assert [r["live"] for r in alone] == [r["live"] for r in together]


def test_the_run_itself_is_the_same_and_its_record_says_so(train, only_run, records_of, weights_of):
    plain, more = (
        only_run(train("ema_basic", folder=f, **s)[1]) for f, s in (("a", {}), ("b", BOTH))
    )
    weights = weights_of(plain), weights_of(more)
    assert all(weights[0]["live"][k].equal(v) for k, v in weights[1]["live"].items())
    assert sorted(weights[1]) == ["ema", "ema@keep", "ema@recalibrate", "live"]
    last = records_of(more)[-1]
    assert last["also_batchnorm"] == ["keep", "recalibrate"]
    assert last["candidates"]["ema@keep"]["batchnorm"] == "keep"


def test_an_average_has_its_own_policy_once(train, only_run, records_of):
    settings = {"trainer.swa.batchnorm": "keep", "trainer.swa.start": 1, "steps": 40}
    run = only_run(train("swa_basic", **settings, **BOTH)[1])
    assert list(records_of(run)[-1]["candidates"]) == ["live", "swa", "swa@recalibrate"]


def test_an_unknown_policy_is_refused(train):
    with pytest.raises(UserError, match=r"no batch-norm policy 'kep' in also_batchnorm; did you"):
        train(also_batchnorm=["kep"])
