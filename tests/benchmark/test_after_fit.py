"""The evaluation after the phase `after_fit`: what stood still is not scored again."""

from __future__ import annotations

import pytest

from dgavg.evaluation import Scorer

WORDS = [
    "trainer=swad_aswa_swag_twa_sma_basic",
    "trainer.sma.start=20",
    "trainer.twa.steps=5",
    "trainer.swag.samples=2",
    "model.width=24",
    "protocol.steps=90",
    "protocol.eval_every=15",
    "holdout=[30]",
    "seeds=[1]",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, run_and_kill):
    """One that went through, and one killed before `after_fit`, which scores all anew."""
    top = tmp_path_factory.mktemp("runs")
    jobs = [(top / "whole", WORDS, None), (top / "killed", WORDS, ["renamed", "checkpoint.pt", 6])]
    ends, errors = run_and_kill(jobs)
    assert ends == [0, -9], errors
    ends, errors = run_and_kill([(top / "killed", WORDS, None)])
    assert ends == [0], errors
    return top


def test_the_record_is_what_a_new_scoring_gives(runs, only_run, content_of, records_of):
    whole, killed = (only_run(runs / name) for name in ("whole", "killed"))
    assert content_of(whole) == content_of(killed)
    fit, after = records_of(whole)[-2:]
    assert (fit["phase"], after["phase"]) == ("fit", "after_fit")
    found = after["candidates"]
    assert found.keys() == fit["candidates"].keys() | {"swag_bma"}
    moved = {k for k in fit["candidates"] if found[k] != fit["candidates"][k]}
    assert "twa" in moved
    assert not moved & {"live", "sma", "swag"}


@pytest.fixture
def calls(monkeypatch):
    """For each call of `Scorer.score`: whether it keeps scores, and the models it made pass on."""
    found = []
    score = Scorer.score

    def spy(self, candidates, **options):
        forward, names = self.forward, set()

        def noting(twin, images):
            names.update(k for k, twins in self._twins.items() if any(t is twin for t in twins))
            return forward(twin, images)

        self.forward = noting
        try:
            scores = score(self, candidates, **options)
        finally:
            self.forward = forward
        found.append((options.get("keep", False), names))
        return scores

    monkeypatch.setattr(Scorer, "score", spy)
    return found


def test_only_what_moved_passes_images_on(train, calls):
    starts = {f"trainer__{name}__start": 1 for name in ("twa", "sma", "swag")}
    train("twa_sma_swag_basic", **starts)
    everything = {"live", "sma", "swag", "twa"}
    assert calls == [*[(False, everything)] * 2, (True, everything), (False, {"twa"})]


def test_scores_are_kept_only_where_such_a_phase_follows(train, calls):
    train("ema_basic")
    assert [keep for keep, _ in calls] == [False] * 3
