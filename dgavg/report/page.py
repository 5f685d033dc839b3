"""The page: everything that runs say, in one HTML file that needs no other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

import dgavg
from dgavg.benchmark.results import SELECTED
from dgavg.benchmark.table import Table
from dgavg.disk import write_atomically, writing
from dgavg.evaluation import RULES
from dgavg.evaluation.selection import SCORES_HELD_OUT
from dgavg.report import details
from dgavg.report.bars import accuracy_panels, gain_panels
from dgavg.report.curves import curve_panels
from dgavg.report.ranking import ranking_panels
from dgavg.report.section import Section
from dgavg.report.style import Key, Palette, Panel, png, variables

HERE = Path(__file__).parent
DIR = "choose another --figures DIR"


@dataclass(frozen=True)
class Drawing:
    """Panels that belong together; `key` says what colours mean where panels don't."""

    title: str
    panels: Sequence[Panel]
    columns: int = 3
    key: dict[str, Key] = field(default_factory=dict)


def page(sections: Sequence[Section]) -> str:
    """The page as text: self-contained, light and dark, for screens, phones and paper."""
    jinja = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=False
    )
    style = (HERE / "page.css").read_text(encoding="utf-8")
    style = style.replace("LIGHT", variables(dark=False)).replace("DARK", variables(dark=True))
    names = dict.fromkeys(section.name for section in sections)
    return jinja.get_template("page.html").render(
        title=f"{', '.join(names)} – dgavg report",
        style=style,
        script=(HERE / "page.js").read_text(encoding="utf-8"),
        sections=[_content(section, f"s{i}") for i, section in enumerate(sections, 1)],
        version=dgavg.__version__,
    )


def write_page(sections: Sequence[Section], path: Path) -> None:
    """Write the page; raises `UserError` where the system refuses."""
    _write(path, page(sections).encode(), "choose another --html FILE")


def write_figures(sections: Sequence[Section], folder: Path) -> list[Path]:
    """Write every figure as PNG; returns the files.

    Raises `UserError` where the system refuses.
    """
    with writing(folder, DIR):
        folder.mkdir(parents=True, exist_ok=True)
    written = []
    for i, section in enumerate(sections, 1):
        parts = [str(i), _plain(section.name), _plain(section.protocol), ""]
        prefix = "-".join(parts) if len(sections) > 1 else ""
        for name, drawing in _drawings(section, f"s{i}").items():
            path = folder / f"{prefix}{name}.png"
            _write(path, png(drawing.panels, drawing.title, drawing.key, drawing.columns), DIR)
            written.append(path)
    return written


def _write(path: Path, content: bytes, hint: str) -> None:
    write_atomically(path, lambda file: file.write(content), hint)


def _plain(name: str) -> str:
    """A name as part of a file name."""
    return re.sub(r"\W+", "-", name).strip("-")


def _drawings(section: Section, id_: str) -> dict[str, Drawing]:
    """Every figure that has something to show, by name."""
    palette, labels = Palette(section.candidates), section.table.labels
    found = {
        "accuracy": Drawing(
            "accuracy (%) by held-out domain",
            accuracy_panels(section, palette, f"{id_}-accuracy"),
        ),
        "gain": Drawing(
            "gain over the live weights (points) by held-out domain",
            gain_panels(section, palette, f"{id_}-gain"),
        ),
    }
    for i, run in enumerate(section.trained(), 1):
        key = {name: (palette.colour(name), palette.dash(name)) for name in section.own(run)}
        number = f"-{i}" if len(section.trained()) > 1 else ""
        panels = curve_panels(section, palette, run, f"{id_}-curves{i}")
        found[f"curves{number}"] = Drawing(f"{labels[run]}: curves and windows", panels, 3, key)
        panels = ranking_panels(section, palette, run, f"{id_}-ranking{i}")
        found[f"ranking{number}"] = Drawing(f"{labels[run]}: test over validation", panels, 4)
    return {name: drawing for name, drawing in found.items() if drawing.panels}


def _content(section: Section, id_: str) -> dict[str, Any]:
    """What the template shows of a section."""
    table = section.table
    palette = Palette(section.candidates)
    drawings = _drawings(section, id_)

    def shown(name: str, small: bool = False) -> dict[str, Any]:
        drawing = drawings.get(name)
        panels = [panel.svg() for panel in drawing.panels] if drawing else []
        key = {
            name: (palette.variable(name), palette.dash(name) != "-")
            for name in (drawing.key if drawing else ())
        }
        return {"panels": panels, "key": key, "small": small}

    runs = section.trained()
    number = {run: f"-{i}" if len(runs) > 1 else "" for i, run in enumerate(runs, 1)}
    correlation_title, correlations = table.correlation_lines()
    batchnorm = details.batchnorm_lines(section)
    count = sum(len(group) for group in section.runs.values())
    seeds = ", ".join(map(str, table.seeds)) or "all together"
    return {
        "id": id_,
        "name": section.name,
        "protocol": section.protocol,
        "chains": list(table.labels.values()),
        "held_out": table.held_out,
        "runs": f"{count} ({'seed' if len(table.seeds) == 1 else 'seeds'} {seeds})",
        "training": table.title()[1],
        "changed": [", ".join(table.changed)] if table.changed else [],
        "headlines": _headlines(table),
        "rule": table.rule,
        "tables": [_table(t, id_) for t in section.tables.values()],
        "accuracy": shown("accuracy"),
        "gain": shown("gain"),
        "curves": [
            {
                "chain": table.labels[run],
                "figure": shown(f"curves{number[run]}"),
                "unknown": _without_window(section, run),
            }
            for run in runs
        ],
        "ranking": [
            {"chain": table.labels[run], "figure": shown(f"ranking{number[run]}", small=True)}
            for run in runs
            if f"ranking{number[run]}" in drawings
        ],
        "correlations": correlations,
        "correlation_title": correlation_title,
        "batchnorm": batchnorm,
        "compared": len(batchnorm[0]) > 4,
        "cost": details.cost_lines(section),
        "settings": details.setting_lines(section),
        "links": details.chain_lines(section),
        "environment": details.environment_lines(section),
    }


def _table(table: Table, id_: str) -> dict[str, Any]:
    """What the template shows of one rule."""
    lines = table.lines()
    title, differences = table.difference_lines()
    several = len(table.seeds) > 1
    return {
        "id": f"{id_}-{table.rule}",
        "rule": table.rule,
        "meaning": RULES[table.rule],
        "oracle": table.rule in SCORES_HELD_OUT,
        "error": "Mean ± standard error over the seeds." if several else "",
        "lines": lines,
        "notes": table.footnotes(lines),
        "difference_title": title,
        "differences": differences,
    }


def _headlines(table: Table) -> list[dict[str, str]]:
    """By chain: what the rule picks over its candidates, or the only one that it has."""
    by_chain: dict[str, list[list[str]]] = {}
    for line in table.lines()[1:]:
        if line[0]:
            by_chain[line[0]] = []
        by_chain[next(reversed(by_chain))].append(line)
    found = []
    for chain, lines in by_chain.items():
        candidate, mean, gain = lines[-1][1], *lines[-1][-2:]
        if mean == "X" or (len(lines) > 1 and candidate != SELECTED):
            continue
        what = "candidate and checkpoint" if candidate == SELECTED else "the checkpoint"
        text = f"where the rule {table.rule} picks {what}"
        if gain:
            text += f", {gain}" + (" against its live weights" if candidate == SELECTED else "")
        found.append({"chain": chain, "value": mean, "text": text})
    return found


def _without_window(section: Section, run: str) -> list[str]:
    """The averages of a chain whose windows are not known."""
    return [
        candidate
        for candidate in section.own(run)
        if candidate != "live" and not any(t.window for t in section.traces(run, candidate))
    ]
