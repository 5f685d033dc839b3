"""evaluate=picked by the rule last: what nothing decides by is scored at a run's end alone."""

from __future__ import annotations

import pytest

from dgavg import UserError

LAST = {"protocol__selection": "last", "seeds": [0, 1]}


def both(train, spec, **more):
    """Tables and folders of runs that score everything, and what is picked."""
    settings = LAST | more
    whole, every = train(spec, folder="every", **settings)
    some, picked = train(spec, folder="picked", evaluate="picked", **settings)
    rows = [t.to_frame().drop(columns="run") for t in (whole, some)]
    assert rows[0].equals(rows[1])
    runs = [sorted(path.parent for path in f.rglob("done")) for f in (every, picked)]
    return list(zip(*runs, strict=True))


@pytest.mark.parametrize("more", [{}, {"protocol__holdout_fraction": 0}])
def test_only_the_end_is_scored(train, records_of, weights_of, more):
    for every, picked in both(train, "sma_ema_basic", trainer__sma__start=3, **more):
        (record,), expected = records_of(picked), records_of(every)
        assert [r["step"] for r in expected] == [8, 16, 24]
        assert record["step"] == 24
        assert record["candidates"] == expected[-1]["candidates"]
        mine, theirs = weights_of(picked), weights_of(every)
        assert mine.keys() == theirs.keys() == {"live", "sma", "ema"}
        assert all(v.equal(theirs[k][n]) for k, ts in mine.items() for n, v in ts.items())


def test_what_links_decide_by_is_scored_on_validation_data(train, records_of):
    more = {"trainer__swad__n_converge": 1, "trainer__swad__n_tolerance": 2}
    for every, picked in both(train, "ema_swad_basic", **more):
        found, expected = records_of(picked), records_of(every)
        assert [r["step"] for r in found] == [8, 16, 24, 24]  # swad has a phase after the fit
        assert found[3]["candidates"] == expected[3]["candidates"]
        for record, other in zip(found[:3], expected[:3], strict=True):
            assert "live" in record["candidates"]
            assert "ema" not in record["candidates"]
            for name, one in record["candidates"].items():
                splits = other["candidates"][name]["splits"]
                assert one["splits"].items() <= splits.items()
                assert set(splits) - set(one["splits"]) == {"d1/in"}


def test_of_a_phase_after_the_fit_the_end_is_scored(train, records_of):
    for every, picked in both(train, "twa_basic", trainer__twa__start=1):
        (found,), expected = records_of(picked), records_of(every)[-1]
        assert found["phase"] == "after_fit"
        assert found["candidates"] == expected["candidates"]


def test_what_may_end_a_run_early_is_refused(train, tmp_path):
    with pytest.raises(UserError, match=r"what a run ends with alone, but stopping.cand.*sel"):
        train(evaluate="picked", stopping__candidate="live", **LAST)
    with pytest.raises(UserError, match=r"but autolr may end a run before: write evaluate=select"):
        train("autolr_basic", evaluate="picked", **LAST)
    with pytest.raises(UserError, match=r"but autolr may end a run before"):
        train("autolr_basic", evaluate="picked", trainer__autolr__drops=[5, 9, 12], **LAST)
    with pytest.raises(UserError, match=r"but swad may end a run before"):
        train("swad_basic", evaluate="picked", trainer__swad__stop=True, **LAST)
    assert not (tmp_path / "runs").exists()
    train("autolr_basic", evaluate="picked", trainer__autolr__drops=[30], steps=40, **LAST)
