"""Selection rules on records made by hand."""

from __future__ import annotations

import math

import pytest

from dgavg import UserError
from dgavg.evaluation import selected_step
from dgavg.evaluation.selection import compared, validation_score


def record(held_out="c", **candidates):
    """A record; a candidate is its accuracies on a/out, b/out and, where given, c/out."""
    names = ("a/out", "b/out", "c/out")
    return {
        "held_out": held_out,
        "candidates": {
            name: {
                "splits": {
                    "c/in": {"accuracy": 0.9},
                    **{k: {"accuracy": v} for k, v in zip(names, values, strict=False)},
                }
            }
            for name, values in candidates.items()
        },
    }


def test_validation_takes_the_best_mean_over_training_domains():
    records = [record(live=(0.9, 0.1)), record(live=(0.6, 0.6)), record(live=(0.3, 0.8))]
    assert selected_step(records, "live", "validation") == 1


@pytest.mark.parametrize("rule", ["validation", "oracle_best"])
def test_the_first_of_ties_is_taken(rule):
    records = [record(live=(0.1, 0.1, 0.1)), *[record(live=(0.5, 0.5, 0.5)) for _ in range(3)]]
    assert selected_step(records, "live", rule) == 1


@pytest.mark.parametrize("held_out_accuracies", [(0.0, 0.0, 0.0), (1.0, 0.0, 0.5), (0.0, 1.0, 1.0)])
def test_validation_never_reads_the_held_out_domain(held_out_accuracies):
    seen = [(0.5, 0.4), (0.5, 0.6), (0.5, 0.5)]
    records = [record(live=(*s, h)) for s, h in zip(seen, held_out_accuracies, strict=True)]
    for r, h in zip(records, held_out_accuracies, strict=True):
        r["candidates"]["live"]["splits"]["c/in"]["accuracy"] = 1 - h
    assert selected_step(records, "live", "validation") == 1


def test_validation_never_reads_training_images():
    records = [record(live=(0.5, 0.5)), record(live=(0.4, 0.4))]
    records[1]["candidates"]["live"]["splits"]["a/in"] = {"accuracy": 1.0}
    assert selected_step(records, "live", "validation") == 0


def test_the_last_rule_takes_the_last_record_of_the_candidate():
    records = [record(live=(0.9, 0.9), ema=(0.9, 0.9)), record(live=(0.1, 0.1))]
    assert selected_step(records, "live", "last") == 1
    assert selected_step(records, "ema", "last") == 0


def test_the_best_oracle_reads_the_held_out_domain():
    records = [record(live=(0.9, 0.9, 0.1)), record(live=(0.1, 0.1, 0.2)), record(live=(1, 1, 0.1))]
    assert selected_step(records, "live", "oracle_best") == 1


def test_the_oracle_never_stops_early_and_goes_by_the_held_out_domain():
    records = [record(live=(0.9, 0.9, 0.8)), record(live=(0.1, 0.1, 0.2))]
    assert compared(records, "live", "oracle") == {1: 0.2}


def test_the_last_rule_goes_by_validation_if_there_is_any():
    assert compared([record(live=(0.2, 0.4))], "live", "last") == {0: pytest.approx(0.3)}
    assert math.isnan(compared([record(live=())], "live", "last")[0])


def test_the_other_domain_that_a_run_left_out_is_no_validation_data():
    both = {**record(live=(0.2, 0.8)), "held_out_with": "b"}
    assert compared([both], "live", "validation") == {0: 0.2}


def left_out_too(step, accuracy, other, held_out="c"):
    """A record of the run that left `held_out` and `other` out, and what it has on `other`."""
    splits = {f"{other}/in": {"accuracy": accuracy}, "c/in": {"accuracy": 1.0}}
    names = {"held_out": held_out, "held_out_with": other}
    return {**names, "step": step, "candidates": {"live": {"splits": splits}}}


RUN = [{**record(live=(0.9, 0.9)), "step": 10}, {**record(live=(0.1, 0.1)), "step": 20}]
PAIRS = {
    "a": [left_out_too(10, 0.4, "a"), left_out_too(20, 0.6, "a")],
    "b": [left_out_too(10, 0.5, "b"), left_out_too(20, 0.5, "b")],
}


def test_cross_validation_takes_the_mean_over_each_other_domain_step_by_step():
    found = compared(RUN, "live", "loo", PAIRS)
    assert found == {0: pytest.approx(0.45), 1: pytest.approx(0.55)}
    assert selected_step(RUN, "live", "loo", PAIRS) == 1


@pytest.mark.parametrize(
    "pairs", [{}, {"a": PAIRS["a"]}, {"a": PAIRS["a"], "b": []}], ids=["none", "one", "no record"]
)
def test_without_a_run_for_each_other_domain_cross_validation_selects_nothing(pairs):
    assert selected_step(RUN, "live", "loo", pairs) is None


def test_a_step_that_a_run_of_two_domains_lacks_is_passed_over():
    assert selected_step(RUN, "live", "loo", {**PAIRS, "b": PAIRS["b"][:1]}) == 0
    twice = {**PAIRS, "b": [*PAIRS["b"], PAIRS["b"][1]]}
    assert selected_step(RUN, "live", "loo", twice) == 0


def test_the_oracle_is_refused_where_the_held_out_domain_was_not_scored():
    records = [record(live=(0.9, 0.9)), record(live=(0.9, 0.9))]
    with pytest.raises(UserError, match=r"the oracle rule reads c/out, which this run did not"):
        selected_step(records, "live", "oracle")


def test_a_candidate_that_came_late_is_selected_among_its_own_records():
    records = [record(live=(0.9, 0.9)), record(live=(0.1, 0.1), swa=(0.2, 0.2))]
    records.append(record(live=(0.1, 0.1), swa=(0.3, 0.3)))
    assert selected_step(records, "swa", "validation") == 2
    assert selected_step(records[:2], "swa", "validation") == 1


@pytest.mark.parametrize("rule", ["validation", "last", "oracle"])
def test_a_candidate_that_never_came_has_no_record(rule):
    assert selected_step([record(live=(0.9, 0.9, 0.9))], "swa", rule) is None
    assert selected_step([], "live", rule) is None


def test_an_unknown_rule_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"no selection rule 'orcale'; did you mean 'oracle'?"):
        selected_step([], "live", "orcale")


def test_the_validation_score_is_the_mean_over_training_domains_alone():
    splits = record(live=(0.2, 0.6, 1.0))["candidates"]["live"]["splits"]
    assert validation_score(splits, "c") == pytest.approx(0.4)
    assert validation_score(splits, "a") == pytest.approx(0.8)
    assert math.isnan(validation_score({"c/out": {"accuracy": 1.0}}, "c"))


def test_another_metric_of_validation_is_nan_where_records_have_null():
    splits = {
        "a/out": {"accuracy": 0.5, "loss": 2.0},
        "b/out": {"accuracy": 1.0, "loss": 1.0},
        "c/out": {"accuracy": 0.0, "loss": 9.0},
    }
    assert validation_score(splits, "c", "loss") == 1.5
    splits["b/out"]["loss"] = None
    assert math.isnan(validation_score(splits, "c", "loss"))
    assert validation_score(splits, "c") == 0.75
