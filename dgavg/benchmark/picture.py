"""A picture of tables, for a page or a talk."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from dgavg.benchmark.table import Table
from dgavg.disk import writing

COLOURS = {r"(?m)^chain .*$": "bold", r"\+\d+\.\d ± \d+\.\d": "green", r"-\d+\.\d ± \d+\.\d": "red"}


def save_svg(tables: Sequence[Table], path: Path) -> None:
    """Draw the tables as they are printed, gains over the live weights in green, as an SVG file."""
    text = Text("\n\n".join(str(table) for table in tables))
    for pattern, style in COLOURS.items():
        text.highlight_regex(re.compile(pattern), style)
    width = max(len(line) for line in text.plain.splitlines())
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True)
    console.print(text, soft_wrap=True)
    with writing(path, "choose another --svg FILE"):
        path.write_text(console.export_svg(title="dgavg report"), encoding="utf-8")
