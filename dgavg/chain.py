"""Trainer names to a checked chain of links; the registry of names."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from torch import nn

from dgavg.errors import UserError, require, unknown
from dgavg.trainer import TRAINERS, Trainer

GROUP = "dgavg.trainers"


@cache
def plugins() -> dict[str, EntryPoint]:
    """Links that other packages register under the entry-point group `dgavg.trainers`, by name."""
    importlib.import_module(GROUP)  # our own first, so that no package can take their names
    return {e.name: e for e in entry_points(group=GROUP) if e.name not in TRAINERS}


def known_trainers() -> list[str]:
    """All names that a chain may use."""
    return sorted({*plugins(), *TRAINERS})


def find_trainer(name: str, spec: str = "") -> type[Trainer]:
    """The link class called `name`.

    Raises `UserError` for an unknown name, and for a plugin that cannot be loaded.
    """
    available = plugins()
    if name not in TRAINERS and name in available:
        try:
            available[name].load()
        except Exception as error:
            raise UserError(f"trainer {name!r} ({available[name].value}): {error}") from error
    if name not in TRAINERS:
        raise unknown("trainer", name, known_trainers(), where=f"'{spec}'" if spec else "")
    return TRAINERS[name]


def chain(spec: str, **settings: Mapping[str, Any]) -> Trainer:
    """A chain by name, outermost first, with the settings of its links.

    `chain("ma_irm_basic", irm={"weight": 10.0})` is `MA(IRM(Basic(), weight=10.0))`.

    Raises `UserError` for unknown names and settings, and for what `check` refuses.
    """
    require(isinstance(spec, str), f"chain({spec!r}): a name such as 'ema_basic'")
    names = spec.split("_")
    classes = [find_trainer(name, spec) for name in names]
    for name in settings.keys() - set(names):
        raise unknown("trainer", name, names, where=f"'{spec}', though it has settings")
    link: Any = None
    for name, cls in zip(reversed(names), reversed(classes), strict=True):
        if not isinstance(settings.get(name, {}), Mapping):
            raise UserError(f"{name}={settings[name]!r}: settings are a dict, by name")
        given = {str(k): v for k, v in settings.get(name, {}).items()}
        for key in given.keys() - setting_names(cls):
            raise unknown("setting", key, setting_names(cls), where=f"trainer.{name}")
        link = cls(link, **given)
    check(link)
    return link  # type: ignore[no-any-return]


def adapting(settings: Mapping[str, Mapping[str, Any]]) -> Trainer:
    """Of a chain by its links' settings, the links that change the model, around `basic`."""
    names = [k for k in settings if find_trainer(k).adapt is not Trainer.adapt]
    return chain("_".join([*names, "basic"]), **{k: settings[k] for k in names})


def adapt(head: Trainer, model: nn.Module, domains: int) -> None:
    """Change `model` as the links of a chain want it, innermost first; once only.

    Raises `UserError` for a model that the links of another chain have changed.
    """
    links = [k for k in list(head)[::-1] if type(k).adapt is not Trainer.adapt]
    wanted, found = [k.name for k in links], getattr(model, "adapted", None)
    if found is None:
        for link in links:
            link.adapt(model, domains)
        model.adapted = wanted  # type: ignore[assignment]  # a plain attribute, copied with it
    require(
        found in (None, wanted),
        f"the model was changed by {found} already, the chain has {wanted}: make a new one",
    )


def setting_names(cls: type[Trainer]) -> list[str]:
    """The settings of a link class, in the order of its definition."""
    return [f.name for f in fields(cls) if f.init and f.name != "inner"]


def spec_of(head: Trainer) -> str:
    """The name of a chain: `ma_irm_basic`."""
    return "_".join(link.name for link in head)


def function_name(function: Callable[..., Any]) -> str:
    """A function as records name it; one without a name of its own has a "<" in it."""
    name = getattr(function, "__qualname__", f"<{type(function).__qualname__}>")
    return f"{function.__module__}.{name}"


def settings_of(head: Trainer) -> dict[str, dict[str, Any]]:
    """The settings of every link by name, outermost first, as JSON would hold them.

    Functions by their qualified name, tuples as lists.
    """

    def plain(value: Any) -> Any:
        if callable(value):
            return function_name(value)
        return list(value) if isinstance(value, tuple) else value

    return {link.name: {k: plain(v) for k, v in link.settings().items()} for link in head}


def renew(head: Trainer) -> Trainer:
    """The same chain with nothing learned yet: same settings, fresh state."""
    inner: Any = renew(head.inner) if head.inner is not None else None
    return type(head)(inner, **head.settings())


def check(head: Trainer, domains: int | None = None, steps: int | None = None) -> None:
    """Refuse a chain that contradicts itself; never reorder one behind the user's back.

    `domains` is the number of training domains and `steps` that of updates, where known already.

    Raises `UserError` with the chain to write instead, where there is one.
    """
    require(isinstance(head, Trainer), f"{head!r} is not a chain, such as EMA(Basic())")
    links = list(head)
    for link in links:
        if type(link) not in TRAINERS.values():
            raise UserError(f"{type(link).__name__} is not a trainer: decorate it with @trainer")
    names = [link.name for link in links]
    spec = "_".join(names)
    for name in names:
        require(names.count(name) == 1, f"{spec}: {name!r} stands in the chain twice")
    others = [n for n in names if n != "basic"]
    require(
        names[-1] == "basic",
        f"{spec}: a chain ends in 'basic', the training step itself: write "
        + "_".join([*others, "basic"]),
    )
    for i, link in enumerate(links):
        require(
            not link.outermost or i == 0,
            f"{spec}: {link.name!r} rewrites the live weights, so it must come first: write "
            + "_".join([link.name, *(n for n in names if n != link.name)]),
        )
    owners = [link.name for link in links if link.owns_step]
    require(len(owners) < 2, f"{spec}: {' and '.join(owners)} each replace the step: choose one")
    rivals = [link.name for link in links if link.compares_gradients]
    require(
        len(rivals) < 2,
        f"{spec}: {' and '.join(rivals)} each compare the domains' gradients, of which the inner "
        "one would see one at a time: choose one",
    )
    for link in links:
        hint = f"; or write trainer.{link.name}.{link.one_domain}" if link.one_domain else ""
        splitter = next((k.name for k in links if k is not link and feeds(k, link)), None)
        require(
            splitter is None or link.min_domains < 2,
            f"{spec}: {link.name!r} compares domains, but {splitter!r} feeds it one at a time"
            + hint,
        )
        require(
            domains is None or link.min_domains <= domains,
            f"{spec}: {link.name!r} needs at least {link.min_domains} training domains, "
            f"here is {domains}" + hint,
        )
    if steps is not None:
        for link in links:
            link.curves(steps)  # of schedules, checked as they are made


def feeds(splitter: Trainer, link: Trainer) -> bool:
    """Whether `splitter` hands `link` batches of one domain, wherever the two stand in a chain.

    One that splits in `grad` comes after `prepare`, whose links see whole batches.
    """

    def wraps(k: Trainer, *names: str) -> bool:
        return any(getattr(type(k), name) is not getattr(Trainer, name) for name in names)

    whole = wraps(link, "prepare") and not wraps(link, "grad", "loss")
    return splitter.splits_domains and (wraps(splitter, "step") or not whole)
