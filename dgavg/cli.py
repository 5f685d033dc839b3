"""The command line: `dgavg` trains; its other commands stand in `dgavg/commands/`."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import hydra

from dgavg.benchmark.table import tables
from dgavg.config import CONF, explained, register
from dgavg.distributed import is_first, launched, only_first_speaks, tell, together
from dgavg.errors import UserError
from dgavg.sweep.job import Job
from dgavg.sweep.multirun import best, multirun
from dgavg.sweep.reports import Report, failures, finished, read_reports
from dgavg.sweep.words import Words, command, read_words


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for a user's mistake, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with explained():
            if given and given[0] in COMMANDS:
                if launched()[0] > 0:  # what does not train needs one process
                    return 0
                module, name = COMMANDS[given[0]]
                getattr(import_module(f"dgavg.commands.{module}"), name)(given[1:])
            else:
                with only_first_speaks(), together():
                    train(given)
    except UserError as error:
        if os.environ.get("DGAVG_DEBUG") == "1":
            raise
        tell(f"dgavg: {error}")
        return 2
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except SystemExit as end:  # of --help
        return int(end.code or 0)
    except KeyboardInterrupt:
        tell("dgavg: interrupted; the same command goes on from the last checkpoint")
        return 130
    return 0


def train(arguments: list[str]) -> None:
    """Compose the settings, train every fold and seed, and print one table for all chains.

    What fails stops nothing else; it is listed at the end. Raises `UserError` then, and where
    nothing could be begun.
    """
    words = read_words(arguments, COMMANDS)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach us whole; we print them in one line
    reports = multirun(words) if words.sweeps else _single(words)
    runs = finished(reports) if is_first() else {}
    if runs:  # none where Hydra only printed something
        found = [text for table in tables(runs) for text in (str(table), table.differences())]
        print("\n\n".join(filter(None, found)))
    winner = best(reports)
    if winner is not None:
        again = command(winner.overrides, words.kept)
        print(f"\nbest: {100 * (winner.value or 0):.1f} % on validation data, by\n  {again}")
    failed = [one for report in reports for one in report.failed]
    if len(failed) == 1 and not runs and not words.sweeps:
        raise UserError(failed[0].message)
    if failed:
        print(*failures(reports, words.kept), sep="\n", file=sys.stderr)
        raise UserError(f"{len(failed)} failed; the same command tries again what is not done")


def _single(words: Words) -> list[Report]:
    """What Hydra does without `-m`: run one job here, or only print something."""
    register()
    with tempfile.TemporaryDirectory() as scratch:
        before, sys.argv = sys.argv, ["dgavg", *words.arguments]
        try:
            job = Job(Path(scratch), strict=True)
            hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")(job)()
        finally:
            sys.argv = before
        return read_reports(Path(scratch))


# Each is imported when it is asked for: most need what training does not.
COMMANDS = {
    "list": ("listing", "show_list"),
    "report": ("report", "report"),
    "soup": ("combine", "soup"),
    "ensemble": ("combine", "ensemble"),
    "predict": ("predict", "predict"),
    "export": ("export", "export"),
    "features": ("features", "features"),
    "domainbed": ("domainbed", "domainbed"),
}

if __name__ == "__main__":
    sys.exit(main())
