"""Schedules: a number of a link that changes with the step, written as a setting."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from dgavg.errors import UserError, require, unknown

Curve = Callable[[int], float]

SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda u: u,
    "cosine": lambda u: 0.5 * (1.0 - math.cos(math.pi * u)),
    "exponential": lambda u: 2.0 / (1.0 + math.exp(-10.0 * u)) - 1.0,
}


def step_of(start: float, steps: int, setting: str) -> int:
    """`start` as a step of a run of `steps`: a share of it below 1, a number of steps from 1 on.

    Raises `UserError` where that is no whole step or past the end of the run.
    """
    require(start >= 0, f"{setting}={start:g}: a share of the run below 1, or a step from 1 on")
    require(
        start < 1 or float(start).is_integer(), f"{setting}={start:g}: a whole step, or below 1"
    )
    step = round(start * steps) if start < 1 else int(start)
    require(
        step < steps,
        f"{setting}={start:g} is past the end: the run has {steps} steps "
        "(below 1 it is a share of them)",
    )
    return step


def _constant(where: str, run: int, *, value: float) -> Curve:
    """`value` at every step."""
    return lambda t: value


def _ramp(
    where: str,
    run: int,
    shape: str,
    *,
    to: float,
    from_: float = 0.0,
    start: float = 0,
    steps: float | None = None,
) -> Curve:
    """`from` up to step `start`, then in `steps` steps to `to`, or in all that are left."""
    first = step_of(start, run, f"{where}.start")
    steps = run - first if steps is None else steps
    length = round(steps * run) if steps < 1 else int(steps)
    require(length > 0 and (steps < 1 or length == steps), f"{where}.steps={steps:g}: whole steps")
    require(
        first + length <= run,
        f"{where} ends {first + length - run} steps past the end: the run has {run} "
        "(steps below 1 are a share of them)",
    )
    curve = SHAPES[shape]

    def value(t: int) -> float:
        u = min(max((t - first) / length, 0.0), 1.0)
        return to if u == 1.0 and shape != "exponential" else from_ + (to - from_) * curve(u)

    return value


def _step(where: str, run: int, *, values: list[float], at: list[float]) -> Curve:
    """`values[0]` before step `at[0]`, `values[1]` from there to `at[1]`, and so on."""
    require(
        len(values) == len(at) + 1, f"{where}: one value more than steps in `at`, to begin with"
    )
    borders = [step_of(step, run, f"{where}.at") for step in at]
    require(borders == sorted(set(borders)), f"{where}.at={at}: steps in rising order")
    return lambda t: values[sum(t >= border for border in borders)]


def _anneal_after(where: str, run: int, *, step: float, to: float, from_: float = 1.0) -> Curve:
    """`from` before step `step`, then `to`: how DomainBed anneals penalties."""
    border = step_of(step, run, f"{where}.step")
    return lambda t: to if t >= border else from_


KINDS: dict[str, Callable[..., Curve]] = {
    "constant": _constant,
    "linear": partial(_ramp, shape="linear"),
    "cosine": partial(_ramp, shape="cosine"),
    "warmup_linear": partial(_ramp, shape="linear"),
    "warmup_exponential": partial(_ramp, shape="exponential"),
    "step": _step,
    "anneal_after": _anneal_after,
}


def is_schedule(value: object) -> bool:
    """Whether a setting was given a schedule in place of a number."""
    return callable(value) or isinstance(value, Mapping)


def curve_of(value: Any, steps: int, setting: str) -> Curve:
    """The function of the step t, from 0 on, that the schedule of `setting` is in a run of `steps`.

    `value` is a function already, or `{KIND: {ARGUMENT: NUMBER}}`; steps below 1 are shares of the
    run. Kinds: `constant` {value}; `linear` and `cosine` {from: 0, to, start: 0, steps: the rest},
    without `steps` at `to` as the run ends; `warmup_linear`, another name of `linear`;
    `warmup_exponential`, its shape 2/(1 + e^(−10u)) − 1 (Ganin et al. 2016, arXiv 1505.07818);
    `step` {values, at}; `anneal_after` {step, from: 1, to}.

    Raises `UserError` for an unknown kind or argument, and for steps past the end of the run.

    >>> curve = curve_of({"warmup_linear": {"to": 10, "steps": 4}}, 100, "trainer.irm.weight")
    >>> [curve(t) for t in (0, 1, 4, 99)]
    [0.0, 2.5, 10, 10]
    """
    if callable(value):
        return partial(_called, value, setting)
    require(
        len(value) == 1,
        f"{setting}={dict(value)}: one schedule, such as {{linear: {{to: 10, steps: 500}}}}",
    )
    ((kind, arguments),) = value.items()
    if kind not in KINDS:
        raise unknown("schedule", str(kind), KINDS, setting)
    where = f"{setting}.{kind}"
    require(
        isinstance(arguments, Mapping),
        f"{where}={arguments!r}: its settings are a dict, such as {{to: 10, steps: 500}}",
    )
    return KINDS[kind](where, steps, **_checked(KINDS[kind], arguments, where))


def _called(function: Curve, setting: str, t: int) -> float:
    try:
        return function(t)
    except TypeError as error:
        raise UserError(f"{setting}: a function of the step, {error}") from error


def _checked(kind: Callable[..., Curve], given: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """The arguments of a schedule: numbers, or lists of them, under names that it has."""
    parameters = inspect.signature(kind).parameters.values()
    known = {p.name.rstrip("_"): p for p in parameters if p.kind is p.KEYWORD_ONLY}
    known.pop("shape", None)
    for name, value in given.items():
        if name not in known:
            raise unknown("setting", str(name), known, where)
        listed = "list" in str(known[name].annotation)
        values = value if listed and isinstance(value, list | tuple) else [value]
        fine = isinstance(value, list | tuple) == listed and all(map(_is_number, values))
        what = "a list of numbers" if listed else "a finite number"
        require(fine, f"{where}.{name}={value!r}: {what}")
    for name, parameter in known.items():
        if parameter.default is parameter.empty and name not in given:
            raise UserError(f"{where}.{name} is missing")
    return {known[name].name: value for name, value in given.items()}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
