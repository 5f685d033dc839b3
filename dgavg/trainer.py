"""The protocol of a link: five wraps, five taps, three offers.

The five rules:

1. *Own plane: `self.inner`; lower plane: `run`.* `SAM.grad` calls `self.inner.grad` twice;
   `Basic.grad` calls `run.loss`, which enters at the head of the chain, so a penalty that stands
   outside SAM still counts. Order across planes makes no difference; order within a plane does.
2. *Wraps are re-entrant; taps own time.* A wrap may run any number of times a step, so it never
   advances a counter or an average: taps do.
3. *A field is a setting or `state()`.* Settings are the constructor, the typed config and the
   printout; `state()` fields are the checkpoint. A setting that is a number may be given as a
   schedule: the run writes its number of this step into the field before each step, so a link
   reads a plain number. One that is read once, in `setup`, is declared `fixed(...)`.
4. *Live weights are written in place only* (`copy_`, `lerp_`, `torch._foreach_*`), never rebound:
   `run.live` aliases them once.
5. *Refuse, never repair.* No chain is reordered behind the user's back.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, dataclass_transform, get_type_hints

from torch import Tensor, nn

from dgavg.batch import Batch, Loss
from dgavg.errors import UserError, require
from dgavg.schedules import curve_of, is_schedule
from dgavg.settings import check_type, fits

if TYPE_CHECKING:
    from dgavg.run import Run

Weights = dict[str, Tensor]  # parameters and buffers by name
Scores = Mapping[str, Mapping[str, float]]  # candidate -> {"accuracy", "loss"} on validation data

TRAINERS: dict[str, type[Trainer]] = {}
TAPS = ("setup", "after_step", "after_eval", "after_epoch", "after_fit")
NUMBERS = (float, float | None)
SCHEDULED = (*NUMBERS, int)  # what a setting may be that follows a schedule
POLICIES = ("keep", "average", "recalibrate")


@dataclass(frozen=True, slots=True)
class Candidate:
    """Weights worth evaluating, and what happens to batch norm before they are.

    `batchnorm`: `keep` uses the live model's running statistics, `average` those in `weights`,
    `recalibrate` exact moments over the un-augmented images of the training domains.
    `members` are weights whose predictions are averaged (the mean of their softmaxes) in place of
    one prediction by `weights`. A `probe` is scored on validation data for a link's own decision
    in `after_eval`: it is in no record, and nothing selects it.
    """

    weights: Weights
    batchnorm: str = "keep"
    members: tuple[Weights, ...] = ()
    probe: bool = False


def state(factory: Callable[[], Any] = lambda: None) -> Any:
    """A field that changes while training: never a setting, always saved and restored.

    Its value is a number, a string, a tensor, `None`, a list or dict of those, or an object with
    `state_dict` and `load_state_dict` that `setup` makes.
    """
    return field(init=False, default_factory=factory, metadata={"state": True})


def fixed(default: Any) -> Any:
    """A number that is read once, before the first step, and so can't follow a schedule."""
    return field(default=default, metadata={"fixed": True})


def state_names(cls: type[Trainer]) -> list[str]:
    """The fields of a link that were declared by `state`."""
    return [f.name for f in fields(cls) if f.metadata.get("state")]


def may_be_scheduled(cls: type[Trainer], setting: str) -> bool:
    """Whether a setting is a number that may follow a schedule."""
    (found,) = [f for f in fields(cls) if f.name == setting]
    return get_type_hints(cls)[setting] in SCHEDULED and not found.metadata.get("fixed")


def _typed(
    curve: Callable[[int], float], kind: type[int] | type[float], name: str
) -> Callable[[int], float]:
    """`curve` with numbers of one type.

    Raises `UserError`, when called, where it gives something else.
    """

    def value(t: int) -> float:
        found = curve(t)
        check_type(found, float, f"{name} at step {t}")
        require(math.isfinite(found), f"{name} is {found} at step {t}")
        whole = kind is float or float(found).is_integer()
        require(whole, f"{name} is {found} at step {t}: an integer; a step schedule gives those")
        return kind(found)

    return value


def is_object(value: object) -> bool:
    """Whether a value saves and restores itself."""
    return hasattr(value, "state_dict") and hasattr(value, "load_state_dict")


@dataclass(slots=True, eq=False, repr=False)
class Trainer:
    """One link of a chain. Links are final: this is the only class they inherit, and they reach the
    link they decorate as `self.inner`, never by `super()`.

    `inner` is the link that this one decorates; only `basic` has none. Traits of a class:
    `outermost` it rewrites the live weights, so it must come first; `min_domains` fewest training
    domains that it means something for; `splits_domains` it hands its inner link batches of one
    domain; `owns_step` it replaces the whole step, so no second such link can stand beside it;
    `compares_gradients` it asks for each domain's gradient by itself, so that a link within that
    compares them would see one; `one_domain` the setting, such as `across=false`, with which it
    needs one domain alone; `stackable` what it does to the weights of several runs side by side, it
    does to each run: it treats every number alone, or is a function of one run's outputs.
    """

    inner: Trainer = None  # type: ignore[assignment]  # only basic has none, and never asks for it
    scheduled: dict[str, Any] = field(init=False, default_factory=dict)  # settings as given
    name: ClassVar[str] = ""
    outermost: ClassVar[bool] = False
    min_domains: ClassVar[int] = 1
    splits_domains: ClassVar[bool] = False
    owns_step: ClassVar[bool] = False
    compares_gradients: ClassVar[bool] = False
    one_domain: ClassVar[str] = ""
    stackable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(
            self.inner is None or isinstance(self.inner, Trainer),
            f"{type(self).__name__}({self.inner!r}): the first argument is the trainer to decorate,"
            " such as Basic()",
        )
        kinds = get_type_hints(type(self))
        for key, value in self.settings().items():
            if is_schedule(value) and kinds[key] in SCHEDULED:
                self._schedule(key, value)
                continue
            check_type(value, kinds[key], f"trainer.{self.name}.{key}")
            if kinds[key] in NUMBERS and fits(value, float):
                setattr(self, key, float(value))  # 1 and 1.0 are one setting
            elif fits(value, int):
                setattr(self, key, int(value))  # NumPy's too
        if not self.scheduled:
            self.validate()

    def _schedule(self, key: str, value: Any) -> None:
        """Take a schedule in place of a number; the run finds out which numbers it gives."""
        require(
            may_be_scheduled(type(self), key),
            f"trainer.{self.name}.{key} is read once, before the first step: it takes a number, no "
            "schedule",
        )
        self.scheduled[key] = copy.deepcopy(value)
        setattr(self, key, math.nan)

    def curves(self, steps: int) -> dict[str, Callable[[int], float]]:
        """The settings that follow a schedule, as functions of the step in a run of `steps`.

        Raises `UserError` where one gives a number, at any step, that `validate` refuses.
        """
        kinds = get_type_hints(type(self))
        found = {
            key: _typed(
                curve_of(value, steps, f"trainer.{self.name}.{key}"),
                int if kinds[key] is int else float,
                f"trainer.{self.name}.{key}",
            )
            for key, value in self.scheduled.items()
        }
        seen = set()
        for t in range(steps if found else 0):
            values = tuple(curve(t) for curve in found.values())
            if values not in seen:
                seen.add(values)
                for key, value in zip(found, values, strict=True):
                    setattr(self, key, value)
                try:
                    self.validate()
                except UserError as error:
                    raise UserError(f"{error} (step {t} of its schedule)") from None
        return found

    def validate(self) -> None:
        """Raise `UserError` for settings that make no sense."""

    # Wraps. Call self.inner.<same> never, once or often; reach a lower plane through `run`.
    def step(self, run: Run, batch: Batch) -> Loss:
        """One update of the weights."""
        return self.inner.step(run, batch)

    def prepare(self, run: Run, batch: Batch) -> Batch:
        """The batch that the step trains on."""
        return self.inner.prepare(run, batch)

    def grad(self, run: Run, batch: Batch) -> Loss:
        """Leave the gradients of one update in `.grad`."""
        return self.inner.grad(run, batch)

    def loss(self, run: Run, batch: Batch) -> Loss:
        """The loss and its terms."""
        return self.inner.loss(run, batch)

    def lr(self, run: Run) -> float:
        """The learning rate of step `run.t`."""
        return self.inner.lr(run)

    # Taps. Never call inner: the run calls each link that has one, innermost first.
    def setup(self, run: Run) -> None:
        """Before the first step, and before a checkpoint is loaded."""

    def after_step(self, run: Run) -> None:
        """After each step; `run.t` counts it already."""

    def after_eval(self, run: Run, scores: Scores) -> None:
        """After each evaluation; `scores` never holds anything of the held-out domain."""

    def after_epoch(self, run: Run) -> None:
        """After every `run.epoch_length` steps, before an evaluation at the same step."""

    def after_fit(self, run: Run) -> None:
        """Once, after the last step: a phase of one's own. The candidates are scored once more."""

    # Offers.
    def adapt(self, model: nn.Module, domains: int) -> None:
        """Change the model before anything else sees it, for `domains` training domains.

        Saved weights have the changed model's names; it must be the same change every time.
        """

    def module(self, run: Run) -> nn.Module | None:
        """A module trained beside the model, reached as `run.extras[name]`."""
        return None

    def candidates(self) -> dict[str, Candidate]:
        """Weights worth evaluating, by name; none before there are any."""
        return {}

    def decides_by(self) -> list[str]:
        """The candidates by whose validation scores this link decides, known before training.

        A link that decides by any can't train where no validation data are held out.
        """
        reads = type(self).after_eval is not Trainer.after_eval
        return ["live", *self.candidate_names()] if reads else []

    def may_end(self) -> bool:
        """Whether this link may end a run before its last step."""
        return False

    def candidate_names(self) -> list[str]:
        """The names that `candidates` gives while training, known before it begins."""
        return [self.name] if type(self).candidates is not Trainer.candidates else []

    def __iter__(self) -> Iterator[Trainer]:
        """The links, outermost first."""
        link: Trainer | None = self
        while link is not None:
            yield link
            link = link.inner

    def __repr__(self) -> str:
        """The chain as Python writes it."""
        words = [f"{k}={v!r}" for k, v in self.settings().items()]
        inner = [] if self.inner is None else [repr(self.inner)]
        return f"{type(self).__name__}({', '.join(inner + words)})"

    def settings(self) -> dict[str, Any]:
        """The settings of this link by name; schedules as they were given."""
        names = [f.name for f in fields(self) if f.init and f.name != "inner"]
        return {name: self.scheduled.get(name, getattr(self, name)) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """The `state()` fields of this link by name."""
        values = {name: getattr(self, name) for name in state_names(type(self))}
        return {
            k: {"object": type(v).__name__, "state": v.state_dict()} if is_object(v) else v
            for k, v in values.items()
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises `UserError` for the state of another link.
        """
        names = state_names(type(self))
        require(
            set(names) == saved.keys(),
            f"the state of {self.name!r} has {sorted(saved)}, not {sorted(names)}",
        )
        for key, value in saved.items():
            current = getattr(self, key)
            if isinstance(value, Mapping) and value.keys() == {"object", "state"}:
                made = f"{self.name}.{key} was a {value['object']}; make it in setup"
                require(is_object(current), f"{made}, so that a checkpoint can be loaded into it")
                current.load_state_dict(value["state"])
            elif isinstance(current, Tensor):
                current.copy_(value)
            else:
                setattr(self, key, value)


T = TypeVar("T")


@dataclass_transform(kw_only_default=True, field_specifiers=(field, state, fixed))
def trainer(name: str, **traits: bool | int | str) -> Callable[[type[T]], type[T]]:
    """Make a class a link: slotted, so it cannot hide state; known by `name` in chains and configs.

    `traits` are class attributes of `Trainer`: `outermost`, `min_domains`, `splits_domains`,
    `owns_step`, `compares_gradients`, `one_domain`, `stackable`. Raises `UserError` for a name that
    a chain can't spell or that another class has.
    """
    require(
        name.isascii() and name.isalnum() and name.islower(),
        f"trainer name {name!r}: lower-case letters and digits only, '_' joins a chain",
    )

    def wrap(cls: type[T]) -> type[T]:
        known = TRAINERS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (
            cls.__module__,
            cls.__qualname__,
        ):
            raise UserError(f"trainer name {name!r} is taken by {known.__module__}")
        if cls.__bases__ != (Trainer,):
            raise UserError(
                f"{cls.__name__} must inherit Trainer and nothing else: links are final"
            )
        link: Any = dataclass(slots=True, eq=False, kw_only=True, repr=False)(cls)
        for key, value in {"name": name, **traits}.items():
            require(hasattr(Trainer, key), f"no trait {key!r} of a trainer")
            setattr(link, key, value)
        TRAINERS[name] = link
        return link  # type: ignore[no-any-return]

    return wrap
