"""Bars: accuracy on each held-out domain, and what the averages add to the live weights there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from dgavg.benchmark.results import SELECTED, Cell
from dgavg.benchmark.statistics import mean_and_error
from dgavg.report.section import Section
from dgavg.report.style import TEXT, Canvas, Palette, Panel, margins, shortened, text_width

WIDTH, ROW, RIGHT = 3.7, 0.21, 0.95  # inches
Values = Mapping[Cell, float]  # by held-out domain and seed
Rows = Mapping[tuple[str, str], Values]  # by chain and candidate


@dataclass(frozen=True)
class Bar:
    """One bar, in percent; `values` are of the seeds. Without any it is a heading."""

    label: str
    colour: str = TEXT
    values: Sequence[float] = ()
    whole: bool = True  # else a seed is missing: there is no mean, so no bar
    signed: bool = False

    @property
    def text(self) -> str:
        """Mean and standard error."""
        if not self.whole:
            return "X"
        mean, error = mean_and_error(self.values)
        sign = "+" if self.signed else ""
        return f"{mean:{sign}.1f}" + (f" ± {error:.1f}" if len(self.values) > 1 else "")


def accuracy_panels(section: Section, palette: Palette, name: str) -> list[Panel]:
    """A panel for each held-out domain, then one of the means over them."""
    rows = {key: cells for key, cells in section.rows.items() if "@" not in key[1]}
    return _panels(section, rows, palette, name, (0.0, 100.0), signed=False)


def gain_panels(section: Section, palette: Palette, name: str) -> list[Panel]:
    """The same of differences to the live weights of the same run; none without averages."""
    rows: dict[tuple[str, str], Values] = {}
    for (run, candidate), cells in section.rows.items():
        live = section.rows.get((run, "live"), {})
        gains = {key: value - live[key] for key, value in cells.items() if key in live}
        if gains and candidate != "live" and "@" not in candidate:
            rows[run, candidate] = gains
    values = [100 * v for gains in rows.values() for v in gains.values()]
    low, high = min(values, default=0.0), max(values, default=0.0)
    room = 0.05 * (high - low)
    limits = (min(low - room, 0.0), max(high + room, 0.0))
    return _panels(section, rows, palette, name, limits, signed=True) if low < high else []


def _panels(
    section: Section,
    rows: Rows,
    palette: Palette,
    name: str,
    limits: tuple[float, float],
    signed: bool,
) -> list[Panel]:
    panels = []
    for i, place in enumerate([*section.table.held_out, None]):
        bars = _bars(section, rows, palette, place, signed)
        title = "mean over the domains" if place is None else f"held out: {place}"
        said = "; ".join(f"{b.label} {b.text}" if b.values else f"{b.label}:" for b in bars)
        panel = Panel(
            f"{name}-{i}",
            (WIDTH, 0.55 + ROW * len(bars)),
            f"{'gain over the live weights' if signed else 'accuracy'} (%), {title}: {said}",
            _drawing(bars, title, limits),
        )
        panels.append(panel)
    return panels


def _bars(
    section: Section, rows: Rows, palette: Palette, place: str | None, signed: bool
) -> list[Bar]:
    """A bar for each candidate on one domain, or of the means; chains are named if several."""
    bars, previous = [], ""
    several = len({run for run, _ in rows}) > 1
    for (run, candidate), cells in rows.items():
        if several and run != previous:
            bars.append(Bar(section.table.labels[run]))
            previous = run
        every = sorted({seed for _, seed in cells}) if section.pooled(run) else section.table.seeds
        domains = section.table.held_out if place is None else [place]
        seeds = [s for s in every if all((d, s) in cells for d in domains)]
        values = [100 * sum(cells[d, s] for d in domains) / len(domains) for s in seeds]
        whole = bool(seeds) and len(seeds) == len(every)
        bars.append(Bar(candidate, palette.colour(candidate), values or [0.0], whole, signed))
    return bars


def _drawing(bars: list[Bar], title: str, limits: tuple[float, float]) -> Callable[[Canvas], None]:
    def draw(figure: Canvas) -> None:
        axes: Axes = figure.subplots()
        labels = [b.label for b in bars if b.values]
        margins(figure, text_width(labels), RIGHT, 0.25, 0.25)
        for y, bar in enumerate(bars):
            if bar.values:
                _draw(axes, y, bar)
            else:
                axes.annotate(shortened(bar.label, 48), (0.01, y), fontsize=8.5, va="center",
                              xycoords=("subfigure fraction", "data"),
                              annotation_clip=False, fontweight="bold")  # fmt: skip
        axes.set_yticks([y for y, b in enumerate(bars) if b.values])
        axes.set_yticklabels(labels)
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.set_xlim(*limits)
        axes.grid(visible=False, axis="y")
        axes.tick_params(length=0)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.set_title(shortened(title, 44))

    return draw


def _draw(axes: Axes, y: int, bar: Bar) -> None:
    axes.text(1.02, y, bar.text, transform=axes.get_yaxis_transform(), va="center", fontsize=8.5)
    axes.plot([0, 0], [y - 0.5, y + 0.5], color=TEXT, linewidth=0.8)
    if not bar.whole:
        return
    mean, error = mean_and_error(bar.values)
    selected = bar.label == SELECTED
    axes.barh(y, mean, 0.72, color="none" if selected else bar.colour, alpha=None if selected
              else 0.55, edgecolor=bar.colour, linewidth=1)  # fmt: skip
    if len(bar.values) > 1:
        axes.errorbar(mean, y, xerr=error, color=TEXT, linewidth=1.2, capsize=2.5, zorder=4)
        axes.plot(bar.values, [y] * len(bar.values), "o", color=bar.colour, markersize=3.2,
                  markeredgecolor=TEXT, markeredgewidth=0.5, zorder=3)  # fmt: skip
