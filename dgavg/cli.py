"""The command line: `dgavg`, `dgavg list`, `dgavg report`."""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig

from dgavg.benchmark.experiment import build
from dgavg.benchmark.leave_one_out import run_experiment
from dgavg.benchmark.table import Runs, read_runs, tables
from dgavg.chain import find_trainer, known_trainers, setting_names
from dgavg.config import CONF, explained, plain, register
from dgavg.data import DATASETS
from dgavg.errors import UserError, unknown
from dgavg.models import MODELS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for a user's mistake, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = {"list": show_list, "report": report}.get(given[0]) if given else None
    try:
        with explained():
            if command is not None:
                command(given[1:])
            else:
                train(given)
    except UserError as error:
        if os.environ.get("DGAVG_DEBUG") == "1":
            raise
        print(f"dgavg: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "dgavg: interrupted; the same command goes on from the last checkpoint", file=sys.stderr
        )
        return 130
    return 0


def train(arguments: list[str]) -> None:
    """Compose the settings, train every fold and seed, and print one table for all chains."""
    for i, word in enumerate(arguments):
        if word == "--seed":
            if len(arguments) < i + 2:
                raise UserError("--seed needs a number, such as --seed 0")
            arguments = [*arguments[:i], f"seeds=[{arguments[i + 1]}]", *arguments[i + 2 :]]
    _refuse_unknown_options(arguments)
    register()
    runs: Runs = {}
    failed: list[UserError] = []

    def job(config: DictConfig) -> None:
        try:
            with explained():
                runs.update(run_experiment(build(plain(config))))
        except UserError as error:  # Hydra would print it its own way
            failed.append(error)

    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach us whole; we print them in one line
    before, sys.argv = sys.argv, ["dgavg", *arguments]
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")(job)()
    finally:
        sys.argv = before
    for error in failed[:-1]:
        print(f"dgavg: {error}", file=sys.stderr)
    if runs:  # none where Hydra only printed something
        print("\n\n".join(str(table) for table in tables(runs)))
    if failed:
        raise failed[-1]


def _refuse_unknown_options(arguments: list[str]) -> None:
    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message}; settings are SETTING=VALUE, see dgavg --help")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    parser.parse_args(arguments)


def report(arguments: list[str]) -> None:
    """Print the table of finished runs."""
    parser = argparse.ArgumentParser("dgavg report", description=report.__doc__)
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("runs")])
    parser.add_argument("--rule", help="selection rule: validation, last or oracle")
    options = parser.parse_args(arguments)
    found = tables(read_runs(options.folders), options.rule)
    print("\n\n".join(str(table) for table in found))


def show_list(arguments: list[str]) -> None:
    """Print the trainers, data sets, models or protocols there are, or the card of one trainer."""
    kinds: dict[str, Callable[[], dict[str, str]]] = {
        "trainers": lambda: {k: _summary(find_trainer(k)) for k in known_trainers()},
        "data": lambda: {k: _summary(v) for k, v in sorted(DATASETS.items())},
        "models": lambda: {k: _summary(v) for k, v in sorted(MODELS.items())},
        "protocols": lambda: {
            p.stem: p.read_text().splitlines()[0].lstrip("# ")
            for p in sorted((CONF / "protocol").glob("*.yaml"))
        },
    }
    if not arguments or arguments[0] not in kinds:
        raise unknown("list", arguments[0] if arguments else "", kinds)
    if arguments[0] == "trainers" and len(arguments) > 1:
        cls = find_trainer(arguments[1])
        print(f"{cls.name}: {inspect.getdoc(cls)}\n\nsettings: {', '.join(setting_names(cls))}")
        return
    entries = kinds[arguments[0]]()
    width = max(map(len, entries))
    for name, summary in entries.items():
        print(f"{name.ljust(width)}  {summary}")


def _summary(thing: object) -> str:
    return (inspect.getdoc(thing) or "").partition("\n")[0]


if __name__ == "__main__":
    sys.exit(main())
