"""Tables of soups: rows over all seeds, the order of domains, what a soup has over its runs."""

from __future__ import annotations

import pytest

from dgavg import Table

PROTOCOL = {"name": "p", "steps": 20, "batch_size": 8, "test_split": "all", "selection": "last"}


def splits_of(held_out, accuracy, domains="abc"):
    splits = {}
    for domain in domains:
        parts = ("in", "out") if domain == held_out else ("out",)
        splits |= {f"{domain}/{p}": {"accuracy": accuracy, "loss": 1.0, "n": 10} for p in parts}
    return splits


def record(held_out, seed, candidate, accuracy, *, members=None, domains="abc", step=20):
    splits = splits_of(held_out, accuracy, domains)
    found = {
        "step": step,
        "held_out": held_out,
        "seed": seed,
        "chain": "soup of live" if members else "basic",
        "trainer": {"soup": {}} if members else {"basic": {}},
        "data": {"name": "toy", "content": "abc"},
        "protocol": PROTOCOL,
        "candidates": {candidate: {"batchnorm": "keep", "splits": splits}},
    }
    return found | ({"members": members} if members else {})


def runs(name, accuracies):
    return {name: [[record(d, s, "live", x)] for (d, s), x in accuracies.items()]}


def of(held_out, **alone):
    """Members by name with what each has alone."""
    return [
        {"run": run, "candidate": "live", "seed": 0, "splits": splits_of(held_out, x)}
        for run, x in alone.items()
    ]


def line(table, chain):
    (found,) = [x for x in str(table).splitlines() if x.startswith(chain)]
    return found


A = {("a", 0): 0.5, ("a", 1): 0.6, ("b", 0): 0.1, ("b", 1): 0.2}
B = {("a", 0): 0.7, ("a", 1): 0.6, ("b", 0): 0.3, ("b", 1): 0.2}


NOTE = "against its runs: the weights it is made of, each scored alone as it was"


@pytest.mark.parametrize("beside", [{}, {**runs("A", A), **runs("B", B)}], ids=["alone", "beside"])
def test_a_soup_is_compared_with_the_mean_of_its_runs_pair_by_pair(beside):
    soups = [
        [record(d, s, "soup", x, members=of(d, A=A[d, s] + 0.05, B=B[d, s] + 0.05))]
        for (d, s), x in {("a", 0): 0.7, ("a", 1): 0.7, ("b", 0): 0.2, ("b", 1): 0.3}.items()
    ]
    table = Table({**beside, "S": soups})
    # 0.05, 0.05, -0.05, 0.05 over 0.65, 0.65, 0.25, 0.25, not over the rows of the runs
    assert line(table, "soup of live").endswith("+2.5 ± 2.2 (3 of 4 better) against its runs")
    assert str(table).endswith(f"\n\n{NOTE}")


def test_without_scores_of_all_runs_there_is_nothing_to_compare_a_soup_with():
    members = of("a", A=0.5, B=0.6)
    del members[1]["splits"]
    table = Table({**runs("A", A), "S": [[record("a", 0, "soup", 0.7, members=members)]]})
    assert "against its runs" not in str(table)


def test_a_row_over_all_seeds_has_one_number_a_domain_beside_rows_of_many():
    pooled = [
        [record(d, -1, "soup", x, members=of(d, A=alone, B=alone + 0.1), domains=d)]
        for d, x, alone in (("b", 0.4, 0.1), ("a", 0.9, 0.5))
    ]
    table = Table({"S": pooled, **runs("A", A)})
    assert str(table).splitlines()[4].split()[2:5] == ["a", "b", "mean"]  # as the data have them
    assert table.seeds == [0, 1]
    assert "2 seeds" in str(table)
    # 0.35 over (0.5 + 0.6) / 2, 0.25 over (0.1 + 0.2) / 2
    assert line(table, "soup of live").split()[3:] == [
        *("soup", "90.0", "40.0", "65.0", "+30.0", "±", "3.5", "(2", "of", "2", "better)"),
        *("against", "its", "runs"),
    ]
    assert line(table, "basic").split()[2:8] == ["55.0", "±", "3.5", "15.0", "±", "3.5"]


def test_a_missing_domain_of_a_pooled_row_is_an_x():
    pooled = [[record("a", -1, "soup", 0.9, members=of("a", A=0.5), domains="a")]]
    table = Table({"S": pooled, **runs("A", A)})
    assert line(table, "soup of live").split()[3:] == ["soup", "90.0", "X", "X"]
    assert "X: not there for each of the seeds 0, 1" in str(table)


def test_a_table_of_pooled_rows_alone_says_so():
    pooled = [
        [record(d, -1, "soup", 0.9, members=of(d, A=0.5), domains=d)] for d in ("b", "a", "c")
    ]
    table = Table({"S": pooled})
    assert "8 images a domain, the runs of all seeds together" in str(table)
    assert table.held_out == ["b", "a", "c"]
    gain = "+40.0 ± 0.0 (3 of 3 better) against its runs"
    assert line(table, "soup of live").endswith(f"90.0  {gain}")
    other = Table({"S": pooled, "T": pooled[:1]})
    assert str(other).endswith("X: not there")


@pytest.mark.parametrize("rule", ["validation", "last", "oracle"])
def test_of_one_record_any_rule_selects_it(rule):
    pooled = [[record("a", -1, "soup", 0.9, members=of("a", A=0.5), domains="a")]]
    (result,) = Table({"S": pooled}, rule).results
    assert (result.accuracy, result.step) == (0.9, 20)
