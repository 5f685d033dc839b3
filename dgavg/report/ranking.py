"""Ranking: does validation accuracy tell which checkpoint is good on the held-out domain?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes

from dgavg.report.section import Section, Trace
from dgavg.report.style import LINE, Canvas, Palette, Panel, margins, shortened

SIZE = (2.5, 2.4)  # inches
Points = tuple[list[float], list[float]]  # validation and test, in percent


def ranking_panels(section: Section, palette: Palette, run: str, name: str) -> list[Panel]:
    """For each candidate of a chain its checkpoints, relative to the mean of their run."""
    clouds = {c: _centred(section.traces(run, c)) for c in section.own(run)}
    clouds = {c: points for c, points in clouds.items() if points[0]}
    if not clouds:
        return []
    ends = [
        [float(v) for v in np.quantile([v for p in clouds.values() for v in p[i]], (0.01, 0.99))]
        for i in (0, 1)
    ]
    limits = [(low - 0.5, high + 0.5) for low, high in ends]
    return [
        Panel(
            f"{name}-{i}",
            SIZE,
            f"{candidate}: test over validation accuracy of {len(points[0])} checkpoints, each "
            "less the mean of its run",
            _drawing(candidate, points, limits, palette),
        )
        for i, (candidate, points) in enumerate(clouds.items())
    ]


def _centred(traces: Sequence[Trace]) -> Points:
    """Differences to the run's mean, since domains differ in level and the rule picks in a run."""
    validation: list[float] = []
    test: list[float] = []
    for trace in traces:
        scored = not any(math.isnan(p.validation + p.test) for p in trace.points)
        if len(trace.points) > 1 and scored:
            validation += _less_mean([p.validation for p in trace.points])
            test += _less_mean([p.test for p in trace.points])
    return validation, test


def _less_mean(values: Sequence[float]) -> list[float]:
    mean = sum(values) / len(values)
    return [100 * (v - mean) for v in values]


def _drawing(
    candidate: str, points: Points, limits: Sequence[tuple[float, float]], palette: Palette
) -> Callable[[Canvas], None]:
    def draw(figure: Canvas) -> None:
        axes: Axes = figure.subplots()
        margins(figure, 0.55, 0.1, 0.42, 0.25)
        axes.axhline(0, color=LINE, linewidth=0.8)
        axes.axvline(0, color=LINE, linewidth=0.8)
        axes.plot(*points, "o", color=palette.colour(candidate), markersize=3.2, alpha=0.6,
                  markeredgewidth=0, gid=f"cloud-{candidate}")  # fmt: skip
        axes.set_xlim(*limits[0])
        axes.set_ylim(*limits[1])
        axes.tick_params(length=0)
        axes.set_title(shortened(candidate, 30))
        axes.set_xlabel("validation (points)")
        axes.set_ylabel("test (points)")

    return draw
