"""Hydra's and OmegaConf's errors in one line: what is wrong, where, and what to write instead."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from dgavg.config.zoo_source import recipe_names
from dgavg.errors import UserError, unknown
from dgavg.settings import words

KINDS = {"data": "data set"}  # what a group is called, where that is not its name
EXTRAS = {  # what installs the plugins of Hydra
    "hydra/launcher": {
        "joblib": "joblib",
        "submitit_local": "submitit",
        "submitit_slurm": "submitit",
        "ray": "ray",
    },
    "hydra/sweeper": {"optuna": "optuna"},
}
TYPES = {"Integer": int, "Float": float, "Boolean": bool, "String": str}


@contextmanager
def explained() -> Iterator[None]:
    """Turn errors of composing a configuration into `UserError`s of one line."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error) from error


def explain(error: BaseException) -> UserError:
    """The `UserError` for an error of Hydra or OmegaConf."""
    root: BaseException | None = error
    while root is not None:
        if isinstance(root, UserError):
            return root
        if isinstance(root, MissingConfigException) and root.missing_cfg_file:
            group, _, name = str(root.missing_cfg_file).rpartition("/")
            if group.startswith("hydra/"):
                return _no_plugin(group, name, root.options or [])
            if f"{group}/".startswith("zoo/"):
                wanted = f"{group}/{name}".removeprefix("zoo/")
                return no_recipe(wanted)
            return unknown(KINDS.get(group, group or "config"), name, root.options or [])
        if isinstance(root, ConfigKeyError | ConfigAttributeError) and root.key is not None:
            parent = root.parent_node
            keys = [str(k) for k in parent.keys()] if hasattr(parent, "keys") else []  # noqa: SIM118
            where = str(root.full_key or "").removesuffix(str(root.key)).rstrip(".")
            if where == "trainer":
                return unknown("trainer", root.key, keys, f"the chain {'_'.join(keys)!r}")
            return unknown("setting", root.key, [k for k in keys if k != "hydra"], where)
        if isinstance(root, MissingMandatoryValue):
            return UserError(f"{root.full_key} is missing: write {root.full_key}=...")
        if isinstance(root, ValidationError):
            return _wrong_type(root)
        if isinstance(root, OverrideParseException):
            hint = "settings are SETTING=VALUE, see dgavg --help"
            return UserError(f"{root.override}: {_first_line(root)}; {hint}")
        root = root.__cause__ or root.__context__
    several = re.match("Ambiguous value for argument '(.*)'", _first_line(error))
    if several is not None:
        name, _, values = several[1].partition("=")
        return UserError(
            f"{several[1]}: write {name}=[{values}] for a list, or dgavg -m to run each of them"
        )
    return UserError(_first_line(error))


def no_recipe(name: str) -> UserError:
    """The error about a recipe that is not there: the nearest, or those of its benchmark."""
    benchmark = name.partition("/")[0]
    names = recipe_names(benchmark) or get_close_matches(name, recipe_names(), n=5, cutoff=0.3)
    return UserError(f"{unknown('recipe', name, names)}; dgavg list zoo has them all")


def _no_plugin(group: str, name: str, there: Sequence[str]) -> UserError:
    """The error about a launcher or sweeper that is not there, or not installed."""
    extras = EXTRAS.get(group, {})
    if name in extras:
        return UserError(f'{group}={name} is not installed: pip install "dgavg[{extras[name]}]"')
    return unknown(group, name, dict.fromkeys([*there, *extras]))


def _wrong_type(error: ValidationError) -> UserError:
    found = re.match(r"Value '(.*?)' .*could not be converted to (\w+)", _first_line(error))
    if "is not a ListConfig" in _first_line(error):
        return UserError(f"{error.full_key} must be a list: write {error.full_key}=[...]")
    if found is None or found[2] not in TYPES:
        return UserError(f"{error.full_key}: {_first_line(error)}")
    return UserError(f"{error.full_key}={found[1]} must be {words(TYPES[found[2]])}")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]
