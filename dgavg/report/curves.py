"""Curves: validation and test accuracy of every candidate by step, with the averages' windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from dgavg.benchmark.statistics import Point
from dgavg.report.section import Section, Trace
from dgavg.report.style import TEXT, Canvas, Palette, Panel, margins, shortened, text_width

WIDTH, HEIGHT, LANE, LEFT = 3.7, 3.3, 0.2, 0.55  # inches
DOTS = 40  # windows of fewer collected weights show each of them
Traces = Mapping[str, Sequence[Trace]]  # by candidate, one a seed
Limits = tuple[float, float]


def curve_panels(section: Section, palette: Palette, run: str, name: str) -> list[Panel]:
    """A panel for each held-out domain of a chain, on the same scales."""
    found = {
        held_out: {c: section.traces(run, c, held_out) for c in section.own(run)}
        for held_out in section.table.held_out
    }
    every = [t for by in found.values() for traces in by.values() for t in traces]
    kinds = [k for k in ("validation", "test") if _limits(every, k) is not None]
    limits = {kind: _limits(every, kind) or (0.0, 100.0) for kind in kinds}
    steps = max((t.points[-1].step for t in every), default=1)
    panels = []
    for i, (held_out, traces) in enumerate(found.items()):
        lanes = [c for c, each in traces.items() if any(t.window for t in each)]
        if any(traces.values()):
            size = (WIDTH, HEIGHT + LANE * len(lanes))
            alt = _alt(held_out, traces)
            draw = _drawing(held_out, traces, lanes, limits, steps, palette)
            panels.append(Panel(f"{name}-{i}", size, alt, draw))
    return panels


def _limits(traces: Sequence[Trace], kind: str) -> Limits | None:
    """From just below the lowest 5 % of the values, which would crush the others, to the top."""
    values = [100 * getattr(p, kind) for t in traces for p in t.points]
    values = [v for v in values if not math.isnan(v)]
    if not values:
        return None
    low, high = float(np.quantile(values, 0.05)), max(values)
    room = max(0.06 * (high - low), 0.5)
    return low - room, high + room


def _alt(held_out: str, traces: Traces) -> str:
    said = []
    for candidate, each in traces.items():
        if each:
            test = sum(t.selected.test for t in each) / len(each)
            steps = ", ".join(str(t.selected.step) for t in each)
            said.append(f"{candidate} {100 * test:.1f} % selected at step {steps}")
    return f"validation and test accuracy by step, held out {held_out}: {'; '.join(said)}"


def _drawing(
    held_out: str,
    traces: Traces,
    lanes: Sequence[str],
    limits: Mapping[str, Limits],
    steps: int,
    palette: Palette,
) -> Callable[[Canvas], None]:
    def draw(figure: Canvas) -> None:
        heights = [1.3] * len(limits) + [LANE * len(lanes)] * bool(lanes)
        grid = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)
        margins(figure, max(LEFT, text_width(lanes)), 0.1, 0.42, 0.25, gap=0.09)
        rows: list[Axes] = list(grid[:, 0])
        for axes, (kind, (low, high)) in zip(rows, limits.items(), strict=False):
            for candidate, each in traces.items():
                _lines(axes, candidate, each, kind, palette)
            axes.set_ylim(low, high)
            axes.set_ylabel(f"{kind} (%)")
        if lanes:
            _lanes(rows[-1], {c: traces[c] for c in lanes}, palette)
        for axes in rows:
            axes.tick_params(length=0)
        rows[0].set_title(shortened(f"held out: {held_out}", 44))
        rows[-1].set_xlabel("step")
        rows[-1].set_xlim(0, 1.02 * steps)

    return draw


def _lines(
    axes: Axes, candidate: str, traces: Sequence[Trace], kind: str, palette: Palette
) -> None:
    """A light line a seed with a dot where it is selected, and the mean over the seeds."""
    colour, dash = palette.colour(candidate), palette.dash(candidate)
    for trace in traces:
        values = _values(trace.points, kind)
        if len(traces) > 1:
            axes.plot(*values, color=colour, alpha=0.28, linewidth=0.8)
        axes.plot(*_values([trace.selected], kind), "o", color=colour, markersize=4,
                  markeredgecolor=TEXT, markeredgewidth=0.6, zorder=4,
                  gid=f"selected-{kind}-{candidate}-{trace.seed}")  # fmt: skip
    by_step: dict[int, list[float]] = {}
    for trace in traces:
        for point in trace.points:
            by_step.setdefault(point.step, []).append(100 * getattr(point, kind))
    mean = {step: sum(v) / len(v) for step, v in by_step.items() if len(v) == len(traces)}
    axes.plot(list(mean), list(mean.values()), color=colour, linestyle=dash,
              gid=f"{kind}-{candidate}")  # fmt: skip


def _values(points: Sequence[Point], kind: str) -> tuple[list[int], list[float]]:
    return [p.step for p in points], [100 * getattr(p, kind) for p in points]


def _lanes(axes: Axes, traces: Traces, palette: Palette) -> None:
    """For each average a lane with a thin line a seed: what its selected weights are made of."""
    for y, (candidate, each) in enumerate(traces.items()):
        for i, trace in enumerate(each):
            at = y + 0.7 * ((i + 0.5) / len(each) - 0.5)
            _window(axes, at, candidate, trace, palette.colour(candidate))
    axes.set_yticks(range(len(traces)))
    axes.set_yticklabels(list(traces), fontsize=8)
    axes.set_ylim(len(traces) - 0.45, -0.55)
    axes.grid(visible=False, axis="y")


def _window(axes: Axes, y: float, candidate: str, trace: Trace, colour: str) -> None:
    found = trace.window
    if found is None:
        return
    remembered = found.last - (found.memory or math.inf)
    thin = found.memory is not None and remembered > found.first
    axes.plot([found.first, found.last], [y, y], color=colour, linewidth=0.7 if thin else 1.6,
              solid_capstyle="butt", gid=f"window-{candidate}-{trace.seed}")  # fmt: skip
    if thin:
        axes.plot([remembered, found.last], [y, y], color=colour, linewidth=1.6,
                  solid_capstyle="butt")  # fmt: skip
    if (found.every > 1 and len(found.steps) <= DOTS) or len(found.steps) == 1:
        axes.plot(found.steps, [y] * len(found.steps), "o", color=colour, markersize=2.2)
