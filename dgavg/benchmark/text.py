"""Pieces of tables as text: cells, differences, columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dgavg.benchmark.statistics import Interval, mean_and_error


def cell(values: Sequence[float], seeds: int) -> str:
    """One cell in percent; X where a seed is missing, since a mean over the others would mislead.

    >>> cell([0.1, 0.2, 0.3], seeds=3), cell([0.1], seeds=1), cell([0.1], seeds=2)
    ('20.0 ± 4.7', '10.0', 'X')
    """
    if not values or len(values) != seeds:
        return "X"
    mean, error = mean_and_error(values)
    return f"{100 * mean:.1f}" + (f" ± {100 * error:.1f}" if len(values) > 1 else "")


def difference(cells: Mapping[Any, float], others: Mapping[Any, float]) -> str:
    """The mean difference over pairs of runs, and how many of them gained."""
    pairs = [cells[key] - others[key] for key in cells if key in others]
    if not pairs:
        return ""
    mean, error = mean_and_error(pairs)
    if len(pairs) == 1:
        return f"{100 * mean:+.1f}"
    better = sum(p > 0 for p in pairs)
    return f"{100 * mean:+.1f} ± {100 * error:.1f} ({better} of {len(pairs)} better)"


def interval(found: Interval | None) -> str:
    """A difference with its interval in percent.

    >>> interval(Interval(0.012, -0.003, 0.027)), interval(None)
    ('+1.2 [-0.3, +2.7]', '')
    """
    if found is None:
        return ""
    return f"{100 * found.mean:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def aligned(lines: Sequence[Sequence[str]], names: int = 2, last: bool = True) -> list[str]:
    """Columns of equal width: the first `names` and the last to the left, figures to the right.

    Without `last` the last column is of figures, too. The first line is ruled off.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    end = len(widths) - 1 if last else len(widths)
    rows = [
        "  ".join(
            text.rjust(w) if names <= i < end else text.ljust(w)
            for i, (text, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return [rows[0], "─" * (sum(widths) + 2 * (len(widths) - 1)), *rows[1:]]
