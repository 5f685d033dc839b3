"""What a run records of its candidates: probes not at all, averaged predictions without weights."""

from __future__ import annotations

import pytest
import torch

from dgavg import Trainer, UserError, trainer
from dgavg.trainer import Candidate, state

SEEN = []


@pytest.fixture(autouse=True)
def _prober():
    """Known while a test runs: others list all links when they are collected."""

    @trainer("prober")
    class Prober(Trainer):
        """Offers a probe, and the predictions of two weights averaged."""

        live: dict = state(dict)

        def setup(self, run):
            self.live = dict(run.live)

        def candidates(self):
            worse = {k: 0 * v for k, v in self.live.items()}
            return {
                "nothing": Candidate(worse, "average", probe=True),
                "pair": Candidate(self.live, "average", members=(self.live, worse)),
            }

        def after_eval(self, run, scores):
            SEEN.append({k: dict(v) for k, v in scores.items()})


def test_a_probe_is_scored_for_its_link_alone(train, only_run, records_of, weights_of):
    SEEN.clear()
    table, runs = train("prober_basic")
    run = only_run(runs)
    assert [list(scores) for scores in SEEN] == [["live", "nothing", "pair"]] * 3
    assert all(0 <= scores["nothing"]["accuracy"] < 0.7 for scores in SEEN)
    for record in records_of(run):
        assert list(record["candidates"]) == ["live", "pair"]
    assert sorted(weights_of(run)) == ["live"]
    assert list(table.to_frame()["candidate"]) == ["live", "pair", "selected"]


def test_a_probe_has_its_own_policy_alone(train):
    SEEN.clear()
    train("prober_basic", also_batchnorm=["keep"])
    assert [list(scores) for scores in SEEN] == [["live", "nothing", "pair", "pair@keep"]] * 3


def test_a_run_with_a_probe_resumes(train, only_run, content_of):
    _, whole = train("prober_basic", folder="whole")
    _, again = train("prober_basic", folder="again")
    run = only_run(again)
    (run / "done").unlink()
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    assert saved["run"]["t"] == 24
    train("prober_basic", folder="again")
    assert content_of(run) == content_of(only_run(whole))


def test_a_run_can_stop_by_a_candidate_that_is_not_named_as_its_link(train):
    settings = {"stopping__patience": 1, "optimizer__lr": 0.3, "steps": 200, "every": 4}
    table, _ = train("posthocema_basic", **settings, stopping__candidate="posthocema10")
    assert table.to_frame()["step"].max() < 200
    with pytest.raises(UserError, match=r"no candidate .posthocema30. in the chain.*posthocema20"):
        train("posthocema_basic", stopping__candidate="posthocema30", folder="other")
