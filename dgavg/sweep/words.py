"""Words: the command line of `dgavg` read as Hydra takes it, and a job written as a command."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser

from dgavg.config import CONF, replacing
from dgavg.errors import UserError, require, unknown

SETTING = re.compile(r"(\+{0,2}|~)[\w@:./-]+=.*|~[\w@:./-]+", re.DOTALL)
PLAIN = re.compile(r"(?!(?:null|true|false|nan|inf)$)[A-Za-z_]\w*|0|[1-9]\d*", re.IGNORECASE)


@dataclass(frozen=True)
class Words:
    """A command line: Hydra's options, the same as words, and overrides of settings."""

    options: argparse.Namespace
    flags: list[str]
    overrides: list[str]

    @property
    def sweeps(self) -> bool:
        """Whether it is a multirun that shall run, not only be shown."""
        o = self.options
        return bool(o.multirun) and not (
            o.cfg or o.help or o.hydra_help or o.info or o.shell_completion
        )

    @property
    def arguments(self) -> list[str]:
        """What Hydra takes, options first."""
        return [*self.flags, *replacing(self.overrides)]

    @property
    def kept(self) -> list[str]:
        """What every command that repeats a part of this one has, too."""
        places = [(f"--{k.replace('_', '-')}", getattr(self.options, k)) for k in PLACES]
        found = [word for flag, value in places if value for word in (flag, value)]
        return found + [w for w in self.overrides if w.startswith("hydra.searchpath=")]


PLACES = ("config_dir", "config_name", "config_path")


def read_words(arguments: Sequence[str], commands: Iterable[str]) -> Words:
    """Read a command line; `--seed N` and `seed=N` become `seeds=[N]`.

    Raises `UserError` for what is neither an option nor a setting; `commands` are what else could
    have been meant.
    """

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message}; settings are SETTING=VALUE, see dgavg --help")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    parser.allow_abbrev = False
    parser.add_argument("--seed")
    options = parser.parse_intermixed_args(list(arguments))
    for word in options.overrides:
        if SETTING.fullmatch(word) is None:
            near = unknown("command", word, commands) if word.isalpha() else f"no setting {word!r}"
            refuse(str(near))
        group, _, choice = word.partition("=")
        if choice in ("", "null") and (CONF / group).is_dir() and group != "experiment":
            refuse(f"{word!r} leaves nothing to choose: write {group}=NAME")
    flags = list(arguments)
    for word in options.overrides:
        flags.remove(word)
    overrides = list(options.overrides)
    if options.seed is not None:
        at = next(i for i, word in enumerate(flags) if word.partition("=")[0] == "--seed")
        del flags[at : at + 1 + ("=" not in flags[at])]
        overrides.append(f"seed={options.seed}")
    overrides = [one for word in overrides for one in _swept(word)]
    return Words(options, flags, _with_seeds(overrides, bool(options.multirun)))


def _swept(word: str) -> list[str]:
    """`hydra.sweeper.params={SETTING: "VALUES"}` as the overrides that it stands for."""
    if not word.startswith("hydra.sweeper.params="):
        return [word]
    found: Any = OverridesParser.create().parse_override(word).value()
    fine = isinstance(found, dict) and all(isinstance(v, str) for v in found.values())
    require(fine, f'{word}: write {{SETTING: "VALUES"}}, or settings alone: SETTING=VALUES')
    return [f"{key}={values}" for key, values in found.items()]


def _with_seeds(overrides: list[str], multirun: bool) -> list[str]:
    """Overrides in which `seed=0,1,2` is `seeds=[0,1,2]`: one job, where nothing splits it."""
    given = [w for w in overrides if w.partition("=")[0] in ("seed", "seeds")]
    short = [w for w in given if w.startswith("seed=")]
    if not short:
        return overrides
    require(len(given) == 1, f"{' and '.join(given)}: write one of them")
    (word,) = short
    found = OverridesParser.create().parse_override(word)
    values = [found.value()]
    if found.is_sweep_override():
        listed = f"{word}: write seeds=[{word[5:]}] for a list, or dgavg -m to run each of them"
        require(multirun, listed)
        require(found.is_discrete_sweep(), f"{word}: write a list such as seed=0,1,2")
        values = list(found.sweep_string_iterator())
    return [w if w != word else f"seeds=[{','.join(map(str, values))}]" for w in overrides]


def one_run(overrides: Iterable[str], fold: Sequence[str], seed: int) -> list[str]:
    """The overrides of one run of a job."""
    others = [w for w in overrides if w.partition("=")[0] not in ("holdout", "seeds")]
    names = ",".join(map(_value, fold))
    return [*others, f"holdout=[{names if len(fold) == 1 else f'[{names}]'}]", f"seeds=[{seed}]"]


def _value(name: str) -> str:
    """A name as Hydra reads it: in quotes, unless it would be the same text without."""
    if PLAIN.fullmatch(name):
        return name
    return '"' + re.sub(r'(\\*)"', r'\1\1\\"', re.sub(r"(\\+)$", r"\1\1", name)) + '"'


def command(overrides: Iterable[str], flags: Sequence[str] = ()) -> str:
    """The `dgavg` line that does what a job with these overrides does, as a shell takes it."""
    latest: dict[str, Any] = {w.partition("=")[0]: w for w in overrides}  # a key counts once
    words = [re.sub(r"^seeds=\[(\d+)\]$", r"seed=\1", word) for word in latest.values()]
    return shlex.join(["dgavg", *flags, *words])
