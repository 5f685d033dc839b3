"""The command line: `dgavg`, `dgavg list`, `dgavg report`, `dgavg soup`, `dgavg ensemble`."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from dgavg.benchmark.combine import combine
from dgavg.benchmark.experiment import build
from dgavg.benchmark.leave_one_out import run_experiment
from dgavg.benchmark.picture import save_svg
from dgavg.benchmark.recipe import RULES as SOUP_RULES
from dgavg.benchmark.recipe import Recipe
from dgavg.benchmark.table import Runs, read_runs, tables
from dgavg.cards import card, table
from dgavg.chain import find_trainer, known_trainers
from dgavg.config import CONF, explained, plain, register, replacing
from dgavg.config.schema import link_schema
from dgavg.data import DATASETS
from dgavg.errors import UserError, unknown
from dgavg.matrix import page
from dgavg.models import MODELS
from dgavg.settings import keyword_settings

WIDE = 300  # columns of a table that is read by a program
SETTING = re.compile(r"(\+{0,2}|~)[\w@:./-]+=.*|~[\w@:./-]+", re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for a user's mistake, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with explained():
            if given and given[0] in COMMANDS:
                COMMANDS[given[0]](given[1:])
            else:
                train(given)
    except UserError as error:
        if os.environ.get("DGAVG_DEBUG") == "1":
            raise
        print(f"dgavg: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except SystemExit as end:  # of --help
        return int(end.code or 0)
    except KeyboardInterrupt:
        print(
            "dgavg: interrupted; the same command goes on from the last checkpoint", file=sys.stderr
        )
        return 130
    return 0


def train(arguments: list[str]) -> None:
    """Compose the settings, train every fold and seed, and print one table for all chains."""
    runs: Runs = {}
    failed: list[UserError] = []

    def job(config: DictConfig) -> None:
        try:
            with explained():
                runs.update(run_experiment(build(plain(config))))
        except UserError as error:  # the other jobs of a multirun go on
            failed.append(error)

    register()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach us whole; we print them in one line
    with tempfile.TemporaryDirectory() as scratch:  # for what Hydra writes about a multirun
        before, sys.argv = sys.argv, ["dgavg", *_for_hydra(arguments, scratch)]
        try:
            hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")(job)()
        finally:
            sys.argv = before
    if runs:  # none where Hydra only printed something
        print("\n\n".join(str(table) for table in tables(runs)))
    for error in failed[:-1]:
        print(f"dgavg: {error}", file=sys.stderr)
    if failed:
        raise failed[-1]


def _for_hydra(arguments: list[str], scratch: str) -> list[str]:
    """The arguments as Hydra takes them: options first, `--seed N` spelt as a setting.

    Raises `UserError` for what is neither an option nor a setting.
    """

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message}; settings are SETTING=VALUE, see dgavg --help")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    parser.allow_abbrev = False
    parser.add_argument("--seed")
    options = parser.parse_intermixed_args(arguments)
    overrides = options.overrides
    for word in overrides:
        if SETTING.fullmatch(word) is None:
            near = unknown("command", word, COMMANDS) if word.isalpha() else f"no setting {word!r}"
            refuse(str(near))
        group, _, choice = word.partition("=")
        if choice in ("", "null") and (CONF / group).is_dir() and group != "experiment":
            refuse(f"{word!r} leaves nothing to choose: write {group}=NAME")
    flags = list(arguments)
    for word in overrides:
        flags.remove(word)
    if options.seed is not None:
        at = next(i for i, word in enumerate(flags) if word.partition("=")[0] == "--seed")
        del flags[at : at + 1 + ("=" not in flags[at])]
        overrides = [*overrides, f"seeds=[{options.seed}]"]
    if options.multirun:
        overrides = [f"hydra.sweep.dir='{scratch}'", *overrides]
    return [*flags, *replacing(overrides)]


def report(arguments: list[str]) -> None:
    """Print the table of finished runs."""

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message}; write dgavg report [FOLDER ...] [--rule RULE] [--svg FILE]")

    parser = argparse.ArgumentParser("dgavg report", description=report.__doc__)
    parser.error = refuse  # type: ignore[method-assign]
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("runs")])
    parser.add_argument("--rule", help="selection rule: validation, last or oracle")
    parser.add_argument("--svg", type=Path, help="draw the tables into this file, too")
    options = parser.parse_intermixed_args(arguments)
    runs, unfinished = read_runs(options.folders)
    found = tables(runs, options.rule)
    print("\n\n".join(map(str, found)))
    if options.svg is not None:
        save_svg(found, options.svg)
    if unfinished:
        _say(f"dgavg: left out {unfinished} run(s) that have not ended")


def soup(arguments: list[str]) -> None:
    """Average the weights that finished runs left, and print them all in one table."""
    parser = argparse.ArgumentParser("dgavg soup", description=soup.__doc__)
    rules = "; ".join(f"{name}: {text}" for name, text in SOUP_RULES.items())
    parser.add_argument("--rule", default="uniform", help=f"{rules} (default: uniform)")
    parser.add_argument(
        "--candidate", default="live", help="which weights of each run (default: live)"
    )
    parser.add_argument(
        "--batchnorm",
        default="recalibrate",
        help="recalibrate: exact moments over the training images; average: those of the runs",
    )
    _combine(parser, "soup", arguments)


def ensemble(arguments: list[str]) -> None:
    """Add up the logits of the weights that finished runs left, and print them all in one table."""
    parser = argparse.ArgumentParser("dgavg ensemble", description=ensemble.__doc__)
    parser.add_argument(
        "--candidate", default="sma", help="which weights of each run (default: sma)"
    )
    _combine(parser, "ensemble", arguments)


def _combine(parser: argparse.ArgumentParser, kind: str, arguments: list[str]) -> None:
    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message}; see dgavg {kind} --help")

    parser.error = refuse  # type: ignore[method-assign]
    parser.add_argument(
        "words",
        nargs="*",
        default=[],
        metavar="FOLDER | SETTING=VALUE",
        help="folders of runs (default: runs); data.root=..., device=..., runs=... for the result",
    )
    parser.add_argument(
        "--across-seeds", action="store_true", help="one of all seeds, on the whole domain held out"
    )
    parser.add_argument("--name", help="the folder of the result (default: made of its settings)")
    options = vars(parser.parse_intermixed_args(arguments))
    words, name = options.pop("words"), options.pop("name")
    folders = [Path(word) for word in words if "=" not in word or Path(word).exists()]
    overrides = [word for word in words if Path(word) not in folders]
    if name is not None:
        overrides.append(f"name={name}")
    runs, unfinished = combine(
        folders or [Path("runs")], Recipe(kind, **options), overrides, note=_say
    )
    print("\n\n".join(str(table) for table in tables(runs)))
    if unfinished:
        _say(f"dgavg: left out {unfinished} run(s) that have not ended")


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def show_list(arguments: list[str]) -> None:
    """Print the trainers, data sets, models or protocols there are, or the card of one of them.

    `pairs` prints the page of all pairs of trainers.
    """
    kinds: dict[str, Callable[[], dict[str, str]]] = {
        "trainers": lambda: {k: card(k).text for k in known_trainers()},
        "data": lambda: {k: inspect.getdoc(v) or "" for k, v in sorted(DATASETS.items())},
        "models": lambda: {k: inspect.getdoc(v) or "" for k, v in sorted(MODELS.items())},
        "protocols": lambda: {
            p.stem: p.read_text().removeprefix("# ")
            for p in sorted((CONF / "protocol").glob("*.yaml"))
        },
    }
    if not 1 <= len(arguments) <= 2:
        raise UserError(
            "list what? Write dgavg list trainers|data|models|protocols [NAME], or pairs"
        )
    kind, *names = arguments
    if kind == "pairs" and not names:
        print(page(), end="")
        return
    if kind == "pairs":
        raise UserError("dgavg list pairs takes no name: it prints the page of all pairs")
    if kind not in kinds:
        raise unknown("list", kind, [*kinds, "pairs"])
    entries = kinds[kind]()
    for name in names:
        if name not in entries:
            raise unknown({"data": "data set"}.get(kind, kind.rstrip("s")), name, entries)
        print("\n".join([f"{name}: {entries[name].rstrip()}", *_settings(kind, name)]))
        return
    if kind == "trainers":
        width = None if sys.stdout.isatty() else WIDE
        Console(width=width, highlight=False).print(table(entries))
        return
    width = max(map(len, entries))
    for name, text in entries.items():
        print(f"{name.ljust(width)}  {text.partition(chr(10))[0]}")


def _settings(kind: str, name: str) -> list[str]:
    """The lines about the settings of one entry and their defaults."""
    if kind == "protocols":
        return []  # its text is its settings
    values: Any
    if kind == "trainers":
        prefix = f"trainer.{name}"
        values = OmegaConf.to_container(OmegaConf.structured(link_schema(find_trainer(name))))
    else:
        prefix = "data" if kind == "data" else "model"
        made = DATASETS[name] if kind == "data" else MODELS[name]
        values = {k: default for k, (_, default) in keyword_settings(made).items()}
    required = ("???", inspect.Parameter.empty)
    shown = [f"  {prefix}.{k}={'...' if v in required else _yaml(v)}" for k, v in values.items()]
    return ["", *shown] if shown else []


def _yaml(value: Any) -> str:
    """A default as it is written on the command line."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_yaml, value))}]"
    return json.dumps(value) if isinstance(value, bool) or value is None else str(value)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "list": show_list,
    "report": report,
    "soup": soup,
    "ensemble": ensemble,
}

if __name__ == "__main__":
    sys.exit(main())
