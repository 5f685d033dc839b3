"""The command line: `dgavg` trains; its other commands stand in `dgavg/commands/`."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig

from dgavg.benchmark.experiment import experiments
from dgavg.benchmark.leave_one_out import run_experiments
from dgavg.benchmark.results import Runs
from dgavg.benchmark.table import tables
from dgavg.config import CONF, explained, plain, register, replacing
from dgavg.distributed import launched, only_first_speaks, tell, together
from dgavg.errors import UserError, unknown

SETTING = re.compile(r"(\+{0,2}|~)[\w@:./-]+=.*|~[\w@:./-]+", re.DOTALL)


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
    """Compose the settings, train every fold and seed, and print one table for all chains."""
    runs: Runs = {}
    failed: list[UserError] = []

    def job(config: DictConfig) -> None:
        try:
            with explained():
                runs.update(run_experiments(experiments(plain(config))))
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
        found = [text for table in tables(runs) for text in (str(table), table.differences())]
        print("\n\n".join(filter(None, found)))
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
