"""Intervals and correlations, against plain formulas and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from benchmark.made_records import record
from scipy import stats

from dgavg import Table
from dgavg.benchmark.statistics import paired_interval, rank_correlation


def test_of_one_domain_the_interval_is_students():
    gains = [0.01, 0.03, -0.02, 0.05]
    wanted = stats.t.interval(0.95, 3, loc=np.mean(gains), scale=stats.sem(gains))
    assert paired_interval({"a": gains}) == pytest.approx((np.mean(gains), *wanted))


def test_the_interval_covers_the_mean_over_domains_in_19_of_20_cases():
    rng = np.random.default_rng(0)
    effects = {"a": 0.0, "b": 0.1, "c": -0.05}  # what domains differ in is no error
    truth, covered, n = np.mean(list(effects.values())), 0, 2000
    for _ in range(n):
        gains = {d: rng.normal(e, 0.02, size=3) for d, e in effects.items()}
        found = paired_interval(gains)
        covered += found.low <= truth <= found.high
    assert abs(covered / n - 0.95) < 0.02


@pytest.mark.parametrize(
    "gains", [{}, {"a": [0.1]}, {"a": [0.1], "b": [0.2]}, {"a": [0.1, 0.2], "b": []}]
)
def test_without_a_second_seed_there_is_no_interval(gains):
    assert paired_interval(gains) is None


def run(curve, **options):
    return [record(10 * i, {"live": pair}, **options) for i, pair in enumerate(curve)]


def test_the_rank_correlation_is_spearmans():
    test, validation = [0.1, 0.3, 0.2, 0.9], [0.5, 0.6, 0.6, 0.7]
    wanted = stats.spearmanr(validation, test).statistic
    assert rank_correlation(run(zip(test, validation, strict=True)), "live") == pytest.approx(
        wanted
    )
    assert rank_correlation(run([(0.1, 0.9), (0.2, 0.8), (0.3, 0.7)]), "live") == pytest.approx(-1)


@pytest.mark.parametrize(
    "curve", [[(0.1, 0.2), (0.2, 0.3)], [(0.1, 0.5), (0.2, 0.5), (0.3, 0.5)]], ids=["two", "flat"]
)
def test_too_few_checkpoints_or_a_flat_curve_have_no_rank_correlation(curve):
    assert rank_correlation(run(curve), "live") is None
    assert rank_correlation(run(curve), "ema") is None


def test_what_follows_the_fit_is_no_checkpoint_of_its_own():
    records = run([(0.1, 0.1), (0.2, 0.2), (0.3, 0.3)])
    after = {
        **records[-1],
        "phase": "after_fit",
        "candidates": record(0, {"live": (0, 1)})["candidates"],
    }
    assert rank_correlation([*records, after], "live") == pytest.approx(1)


def chains(gain):
    """Two chains, of which the second has `gain` over the first at each seed."""
    found = {}
    for chain, plus in (("basic", [0, 0, 0]), ("irm_basic", gain)):
        found[chain] = [
            [record(20, {"live": (0.5 + s / 50 + plus[s], 0.5)}, seed=s, chain=chain)]
            for s in range(3)
        ]
    return found


def test_the_text_compares_each_chain_with_the_first_seed_by_seed():
    text = Table(chains([0.01, 0.03, 0.02])).differences()
    low, high = stats.t.interval(0.95, 2, loc=2.0, scale=stats.sem([1.0, 3.0, 2.0]))
    assert "difference to basic, paired by held-out domain and seed (95 % interval" in text
    wanted = f"+2.0 [{low:+.1f}, {high:+.1f}]"
    assert text.splitlines()[-1].split("  ") == ["irm_basic", wanted, wanted]


def test_the_text_has_the_mean_correlation_of_each_candidate():
    runs = {
        "r": [
            run([(0.1, 0.1), (0.2, 0.2), (0.3, 0.3)]),
            run([(0.1, 0.3), (0.2, 0.2), (0.3, 0.1)], seed=1),
        ]
    }
    text = Table(runs).correlations()
    assert text.splitlines()[-1].split() == ["ema_basic", "live", "0.00", "±", "0.71", "2"]


def test_a_chain_is_named_once_in_the_text():
    both = [record(i, {"live": (i, i), "ema": (i, -i)}) for i in range(3)]
    lines = Table({"r": [both]}).correlations().splitlines()[-2:]
    assert [line.split() for line in lines] == [
        ["ema_basic", "live", "1.00", "1"],
        ["ema", "-1.00", "1"],
    ]


def test_one_chain_without_a_curve_has_nothing_to_say():
    table = Table({"r": [run([(0.1, 0.1)])]})
    assert table.differences() == table.correlations() == ""
