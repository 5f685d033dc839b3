"""Statistics of tables: errors as DomainBed prints them, paired intervals, rank correlations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from dgavg.benchmark.results import Records, test_score
from dgavg.evaluation.selection import held_out_of, validation_score

LEVEL = 0.95
FEWEST = 3  # checkpoints that have a rank correlation


class Interval(NamedTuple):
    """A mean with the confidence interval about it; accuracies in [0, 1]."""

    mean: float
    low: float
    high: float


class Point(NamedTuple):
    """One evaluation of one candidate; accuracies in [0, 1]."""

    step: int
    validation: float
    test: float


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error as DomainBed prints it, the population deviation over √n.

    >>> [round(v, 4) for v in mean_and_error([0.1, 0.2, 0.3])]
    [0.2, 0.0471]
    """
    n = len(values)
    mean = sum(values) / n
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / n) / math.sqrt(n)


def paired_interval(differences: Mapping[str, Sequence[float]]) -> Interval | None:
    """The mean over domains of differences between paired runs, with Student's interval.

    `differences`: by held-out domain, one a seed. The domains are what they are and the seeds are
    a sample: the variance is that within domains (a stratified sample, Cochran 1977, ch. 5), pooled
    over them for the degrees of freedom. `None` where no domain has two seeds or one has none.

    >>> found = paired_interval({"a": [0.1, 0.3], "b": [0.2, 0.2]})
    >>> [round(x, 3) for x in found]  # 0.2 ± 4.303 · √(0.01 / 2 + 0.01 / 2) / 2
    [0.2, -0.015, 0.415]
    """
    from scipy import stats  # a second of every start, if it were above

    each = [np.asarray(v, dtype=float) for v in differences.values()]
    freedom = sum(len(v) - 1 for v in each)
    if not each or min(map(len, each)) == 0 or freedom == 0:
        return None
    pooled = sum(float(((v - v.mean()) ** 2).sum()) for v in each) / freedom
    error = math.sqrt(sum(pooled / len(v) for v in each)) / len(each)
    mean = float(np.mean([v.mean() for v in each]))
    reach = float(stats.t.ppf(0.5 + LEVEL / 2, freedom)) * error
    return Interval(mean, mean - reach, mean + reach)


def rank_correlation(records: Records, candidate: str) -> float | None:
    """Spearman's rank correlation of validation and test accuracy over a run's checkpoints.

    How well the one tells which checkpoint is good at the other (Arpit et al. 2022, arXiv
    2110.10832). `None` where there are fewer than three checkpoints, or one of the two never
    changes.
    """
    fit = [record for record in records if record.get("phase", "fit") == "fit"]
    points = curve(fit, candidate)
    values = [[p.validation for p in points], [p.test for p in points]]
    if len(points) < FEWEST or math.isnan(math.fsum(chain(*values))):
        return None  # nor where only what validation picked was tested: no fair sample
    if any(len(set(v)) == 1 for v in values):
        return None
    from scipy import stats

    return float(stats.spearmanr(*values).statistic)


def curve(records: Records, candidate: str) -> list[Point]:
    """What a candidate reached at each evaluation; NaN where validation or test was not scored."""
    return [
        Point(
            record["step"],
            validation_score(record["candidates"][candidate]["splits"], held_out_of(record)),
            test_score(record, candidate)[0],
        )
        for record in records
        if candidate in record["candidates"]
    ]
