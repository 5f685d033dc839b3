"""DomainBed's tables, character for character as its `collect_results` prints them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dgavg.benchmark.domainbed.names import ALGORITHMS, ENVIRONMENTS
from dgavg.benchmark.domainbed.records import Record
from dgavg.benchmark.domainbed.selection import RULES, Rule, accuracies
from dgavg.errors import require

WIDTH, AVERAGES_WIDTH = 20, 25  # of a column, in DomainBed's tables of a data set and of averages


@dataclass(frozen=True)
class Style:
    """LaTeX or text, and the least width of the column of algorithms."""

    latex: bool
    names: int

    def row(self, cells: Sequence[str], width: int) -> str:
        """Cells cut and padded to their columns, and what DomainBed ends a row with."""
        widths = [max(width, self.names)] + [width] * (len(cells) - 1)
        padded = [cell.ljust(w)[:w] for cell, w in zip(cells, widths, strict=True)]
        return " & ".join(padded) + r" \\" if self.latex else "  ".join(padded) + " "

    def cell(self, values: Sequence[float]) -> str:
        """Mean and standard error (the population deviation over √n) in percent, or X."""
        if not values:
            return "X"
        error = 100 * np.std(np.asarray(values) / np.sqrt(len(values)))
        sign = r"$\pm$" if self.latex else "+/-"
        return f"{100 * np.mean(values):.1f} {sign} {error:.1f}"

    def table(
        self, header: str, columns: Sequence[str], rows: Iterable[Sequence[str]]
    ) -> list[str]:
        """The lines of one table; LaTeX has no header."""
        width = AVERAGES_WIDTH if header.startswith("Averages") else WIDTH
        if self.latex:
            columns = [r"\textbf{" + c.replace("%", r"\%") + "}" for c in columns]
        lines = [self.row(columns, width), *(self.row(cells, width) for cells in rows)]
        if not self.latex:
            return ["", f"-------- {header}", *lines]
        return [
            *("", r"\begin{center}", r"\adjustbox{max width=\textwidth}{%"),
            *(r"\begin{tabular}{l" + "c" * (len(columns) - 1) + "}", r"\toprule"),
            *(lines[0], r"\midrule", *lines[1:]),
            *(r"\bottomrule", r"\end{tabular}}", r"\end{center}"),
        ]


def render(records: Sequence[Record], *, latex: bool = False, names: int = 0) -> str:
    """All tables of some records: for each rule one a data set, and one of averages.

    The text is DomainBed's, without its last newline. A data set that DomainBed doesn't know is in
    none of its tables; here it follows those where its records name their `environments`, as those
    of dgavg do. `names` is the least width of the column of algorithms, which DomainBed cuts at 20
    or 25 characters.

    Raises `UserError` where no data set of the records is known, so that there is nothing to show.
    """
    style = Style(latex, names)
    environments = known(records)
    found = sorted({r["args"]["dataset"] for r in records})
    require(
        bool(environments),
        f"DomainBed has no data set {', '.join(found)}, so there is no table to print",
    )
    lines = [f"Total records: {len(records)}"]
    if latex:
        lines = [
            *(r"\documentclass{article}", r"\usepackage{booktabs}", r"\usepackage{adjustbox}"),
            *(r"\begin{document}", r"\section{Full DomainBed results}", f"% {lines[0]}"),
        ]
    for rule in RULES:
        lines += _section("subsection", f"Model selection: {rule.name}") if latex else []
        lines += _tables(records, rule, environments, style)
    return "\n".join([*lines, r"\end{document}"] if latex else lines)


def known(records: Iterable[Record]) -> dict[str, Sequence[str]]:
    """The domains of each data set that gets a table, in the order of the tables."""
    own: dict[str, Sequence[str]] = {}
    given = set()
    for record in records:
        name = record["args"]["dataset"]
        given.add(name)
        if "environments" in record and name not in ENVIRONMENTS:
            own.setdefault(name, record["environments"])
    return {k: v for k, v in ENVIRONMENTS.items() if k in given} | dict(sorted(own.items()))


def _tables(
    records: Sequence[Record], rule: Rule, environments: Mapping[str, Sequence[str]], style: Style
) -> Iterator[str]:
    scores = accuracies(records, rule)
    present = list(dict.fromkeys(r["args"]["algorithm"] for r in records))
    algorithms = [a for a in ALGORITHMS if a in present]
    algorithms += [a for a in present if a not in ALGORITHMS]

    def rows(columns: Mapping[str, Mapping[str, Sequence[float]]]) -> Iterator[list[str]]:
        for algorithm in algorithms:
            values = [cells.get(algorithm, []) for cells in columns.values()]
            means = [100 * float(np.mean(v)) for v in values if v]
            whole = len(means) == len(values)
            average = f"{sum(means) / len(means):.1f}" if whole else "X"
            yield [algorithm, *map(style.cell, values), average]

    averages: dict[str, dict[str, list[float]]] = {}
    for dataset, domains in environments.items():
        columns: dict[str, dict[str, list[float]]] = {str(i): {} for i in range(len(domains))}
        trials: dict[str, dict[int, list[float]]] = {}
        for (name, algorithm, env, trial), accuracy in scores.items():
            if name == dataset:
                columns.setdefault(str(env), {}).setdefault(algorithm, []).append(accuracy)
                trials.setdefault(algorithm, {}).setdefault(trial, []).append(accuracy)
        # the mean of a trial is over the domains it has, whether those are all or not
        averages[dataset] = {
            algorithm: [float(np.mean(found[trial])) for trial in sorted(found)]
            for algorithm, found in trials.items()
        }
        shown = {k: v for k, v in columns.items() if int(k) < len(domains)}
        header = f"Dataset: {dataset}, model selection method: {rule.name}"
        yield from _section("subsubsection", dataset) if style.latex else []
        yield from style.table(header, ["Algorithm", *domains, "Avg"], rows(shown))
    header = f"Averages, model selection method: {rule.name}"
    yield from _section("subsubsection", "Averages") if style.latex else []
    yield from style.table(header, ["Algorithm", *environments, "Avg"], rows(averages))


def _section(level: str, title: str) -> list[str]:
    return ["", f"\\{level}{{{title}}}"]
