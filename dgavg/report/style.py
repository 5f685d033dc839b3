"""Colours and letters of figures, and SVG that takes the colours of the page it stands in."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D

# Okabe and Ito's colours for all kinds of colour vision, then Tol's muted ones; light and dark.
PALETTE = (
    ("#0072b2", "#4fb0e8"),
    ("#d55e00", "#ff8a3d"),
    ("#009e73", "#2fcf9f"),
    ("#b04a8b", "#e58fc4"),
    ("#c98a00", "#f0b93a"),
    ("#3f51a3", "#99a8f5"),
    ("#882255", "#e07fa8"),
    ("#6b6b1f", "#c9c95a"),
)
LIVE = "#6e6e6e"
TEXT, LINE = "#1b1b1b", "#c9c9c9"  # become currentColor and --line in the page
Canvas = Figure | SubFigure  # what a panel is drawn on: a page's own, or part of a PNG
HEAD, LINES, ENTRY = 0.45, 0.22, 1.35  # inches: above a PNG's panels, of lines of its key
DPI = 144
Dash = str | tuple[int, tuple[float, ...]]
Key = tuple[str, Dash]  # how a candidate is drawn
DASHES: tuple[Dash, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)))

RC = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.parse_math": False,  # names of chains and domains may hold $
    "svg.fonttype": "none",  # text stays text: selectable, and in the page's own font
    "svg.hashsalt": "dgavg",
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": LINE,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": TEXT,
    "ytick.labelcolor": TEXT,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
}


class Palette:
    """A colour and a dash for each candidate, the same in every figure; the live weights grey."""

    def __init__(self, candidates: Iterable[str]) -> None:
        self.names = [name for name in candidates if name != "live"]

    def colour(self, candidate: str) -> str:
        """As the light palette has it; `selected` is like text."""
        if candidate == "live":
            return LIVE
        name = candidate.partition("@")[0]
        return PALETTE[self.names.index(name) % len(PALETTE)][0] if name in self.names else TEXT

    def dash(self, candidate: str) -> Dash:
        """Solid, until the colours are used up."""
        at = self.names.index(candidate) if candidate in self.names else 0
        return DASHES[at // len(PALETTE) % len(DASHES)]

    def variable(self, candidate: str) -> str:
        """The colour as the page's style sheet calls it."""
        return _variables()[self.colour(candidate)]


def _variables() -> dict[str, str]:
    found = {colour: f"var(--c{i})" for i, (colour, _) in enumerate(PALETTE)}
    return {**found, LIVE: "var(--live)", TEXT: "currentColor", LINE: "var(--line)"}


def variables(dark: bool) -> str:
    """The palette as CSS declarations."""
    return " ".join(f"--c{i}: {pair[dark]};" for i, pair in enumerate(PALETTE))


@contextmanager
def drawing() -> Iterator[None]:
    """Figures made here look like the page, and a name in any script is no warning."""
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **RC}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        warnings.filterwarnings("ignore", "Matplotlib currently does not support")
        yield


@dataclass(frozen=True)
class Panel:
    """One drawing: `name` is its id in the page, `size` in inches, `alt` says what it shows."""

    name: str
    size: tuple[float, float]
    alt: str
    draw: Callable[[Canvas], None]

    def svg(self) -> str:
        """As an `<svg>` element for the middle of a page."""
        with drawing():
            figure = Figure(figsize=self.size)
            self.draw(figure)
            file = io.StringIO()
            figure.savefig(file, format="svg", transparent=True)
        return _inline(file.getvalue(), self.name, self.alt)


def png(panels: Sequence[Panel], title: str, key: Mapping[str, Key], columns: int) -> bytes:
    """Panels side by side on white, with what the colours mean above them."""
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    width = columns * max(p.size[0] for p in panels)
    height = rows * max(p.size[1] for p in panels)
    across = max(int(width / ENTRY), 1)
    top = HEAD + LINES * -(-len(key) // across)
    with drawing():
        figure = Figure(figsize=(width, height + top), facecolor="white")
        parts = figure.subfigures(2, 1, squeeze=False, height_ratios=[top, height])
        head, body = parts[:, 0]
        head.text(0.1 / width, 1 - 0.12 / top, title, va="top", fontsize=11)
        handles = [Line2D([], [], color=c, linestyle=dash, label=n) for n, (c, dash) in key.items()]
        head.legend(handles=handles, loc="lower left", ncols=across, fontsize=9)
        for panel, part in zip(panels, body.subfigures(rows, columns, squeeze=False).flat,
                               strict=False):  # fmt: skip
            panel.draw(part)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()


def margins(
    figure: Canvas, left: float, right: float, bottom: float, top: float, gap: float = 0.0
) -> None:
    """Room about the axes of a panel, and between them, in inches: text never moves them."""
    width, height = figure.bbox.width / figure.dpi, figure.bbox.height / figure.dpi
    figure.subplots_adjust(
        left=left / width,
        right=1.0 - right / width,
        bottom=bottom / height,
        top=1.0 - top / height,
        hspace=0.0,
    )
    for axes in figure.get_axes()[:-1]:
        box = axes.get_position()
        axes.set_position((box.x0, box.y0 + gap / height, box.width, box.height - gap / height))


def text_width(labels: Iterable[str]) -> float:
    """Inches that labels at the left of a panel need, about."""
    return 0.15 + 0.075 * max(map(len, labels), default=0)


def shortened(text: str, most: int) -> str:
    """At most so many letters: what is cut is the middle.

    >>> shortened("sma_ema_swad_irm_basic", 12)
    'sma_ema…asic'
    """
    if len(text) <= most:
        return text
    tail = (most - 1) // 3 + 1
    return f"{text[: most - 1 - tail]}…{text[-tail:]}"


def _inline(text: str, name: str, alt: str) -> str:
    """Without what only a file needs; with ids of its own, and the colours of the page."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[\w.]+_\d+">', "<g>", text)  # numbered parts that nothing refers to
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'xlink:href="#', f'href="#{name}-', text)
    for colour, variable in _variables().items():
        text = text.replace(colour, variable)
    inside = re.sub(r"^<svg[^>]*>", "", text)
    box = re.search(r'viewBox="[^"]*"', text)
    head = f'<svg id="{name}" role="img" aria-labelledby="{name}-title" {box[0] if box else ""}>'
    return f'{head}<title id="{name}-title">{html.escape(alt)}</title>{inside}'
