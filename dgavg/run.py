"""Run: one training run, explicit, handed to every link, saved and restored as a whole."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dgavg.batch import Batch, Loss
from dgavg.chain import adapt, chain, check, renew, settings_of
from dgavg.errors import UserError, require
from dgavg.gather import same_on_all
from dgavg.losslog import LossLog
from dgavg.optimizers import optimizer_factory
from dgavg.schedules import step_of
from dgavg.seeding import random_states, set_random_states
from dgavg.settings import check_type
from dgavg.trainer import TAPS, Candidate, Scores, Trainer, Weights
from dgavg.update import Update

COMPILE = ("default", "reduce-overhead", "max-autotune")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
ADAM: OptimizerFactory = optimizer_factory("adam", lr=1e-3)  # of a run that names none


class Batches(Protocol):
    """Where training batches come from: batch t is a pure function of t.

    `names` are the training domains; `classes` how many labels there are; `epoch_length` how many
    steps make an epoch.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """The training domains, in the order of `Batch.d`."""

    @property
    def classes(self) -> int:
        """The number of labels."""

    @property
    def epoch_length(self) -> int:
        """Steps an epoch."""

    def __call__(self, t: int) -> Batch:
        """Batch `t`."""


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context of a forward pass in a precision, a key of `PRECISIONS`."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=PRECISIONS[precision])


def to_device(value: Any, device: torch.device) -> Any:
    """Nested dicts and lists with their tensors on `device`."""
    if isinstance(value, Mapping):
        return {k: to_device(v, device) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_device(v, device) for v in value]
    return value.to(device) if isinstance(value, Tensor) else value


class Run:
    """One training run of a chain; `dgavg.fit(run)` trains it.

    `trainer` is a chain or its name; the run takes its settings and makes links of its own, so one
    chain serves any number of runs. `model` has a `featurizer` (inputs to (N, F)) and a
    `classifier` ((N, F) to (N, classes)). `optimizer(parameters)` makes the optimizer;
    where it isn't given that is fused Adam at 1e-3. `schedule(t)` multiplies its learning rate.
    `evaluate(run)` returns the candidates' scores on validation data, every `eval_every` steps and
    at the end (0: at the end alone), for the first time at `first_eval`; `stopping(scores so far)`
    returns why to stop, or "".
    `precision` is `fp32`, `bf16` or `fp16` (autocast, weights stay float32; fp16 scales the loss).
    `compile` is a mode of `torch.compile` for the passes of training: `default`, `reduce-overhead`
    (CUDA graphs) or `max-autotune`.
    `clip` is the largest norm that the gradient of an update may have. `seed` seeds the draws of
    `run.random`; the global generators are the caller's.

    Where several processes train together, each gives its own share of the rows of every domain as
    `batches`, all start from the first one's weights, and `state_dict`, `load_state_dict` and all
    that trains is called by all of them alike.

    Raises `UserError` for a chain that can't train on these domains.
    """

    def __init__(
        self,
        trainer: Trainer | str,
        model: nn.Module,
        batches: Batches,
        *,
        steps: int,
        optimizer: OptimizerFactory = ADAM,
        schedule: Callable[[int], float] = lambda t: 1.0,
        evaluate: Callable[[Run], Scores] | None = None,
        eval_every: int = 0,
        first_eval: int | None = None,
        stopping: Callable[[list[Scores]], str] = lambda scores: "",
        precision: str = "fp32",
        compile: str | None = None,
        clip: float | None = None,
        seed: int = 0,
    ) -> None:
        check_type(steps, int, "steps")
        require(steps > 0, f"steps={steps}: a run has at least one step")
        require(eval_every >= 0, f"eval_every={eval_every}: a number of steps, or 0")
        require(first_eval is None or first_eval > 0, f"first_eval={first_eval}: a step from 1 on")
        require(seed >= 0, f"seed={seed}: a number from 0 on")
        for part in ("names", "classes", "epoch_length"):
            require(hasattr(batches, part), f"batches has no {part}: see dgavg.run.Batches")
        require(callable(optimizer), "optimizer is a function of the parameters that makes one")
        require(precision in PRECISIONS, f"precision={precision}: choose {', '.join(PRECISIONS)}")
        require(
            compile in (None, *COMPILE), f"compile={compile}: choose none or {', '.join(COMPILE)}"
        )
        require(clip is None or clip > 0, f"clip={clip}: a number above 0, or none")
        for part in ("featurizer", "classifier"):
            require(
                isinstance(getattr(model, part, None), nn.Module),
                f"{type(model).__name__} has no {part}: wrap it as dgavg.models.Model(featurizer, "
                "classifier)",
            )
        self.names = tuple(batches.names)
        trainer = chain(trainer) if isinstance(trainer, str) else trainer
        check(trainer, domains=len(self.names))
        self.trainer = trainer = renew(trainer)
        self.curves = [(k, found) for k in trainer if (found := k.curves(steps))]
        self.model, self.batches, self.steps = model, batches, steps
        self.classes, self.epoch_length = batches.classes, batches.epoch_length
        self.schedule, self.stopping = schedule, stopping
        self.evaluate, self.eval_every = evaluate, eval_every or steps
        self.first_eval = self.eval_every if first_eval is None else first_eval
        self.precision, self.seed = precision, seed
        require(
            any(p.requires_grad for p in model.parameters()),
            f"{type(model).__name__} has no parameter that could be trained",
        )
        self.device = next(model.parameters()).device
        self.t = 0  # steps taken
        self.evaluated = 0  # the step of the last evaluation
        self.stop = ""  # why training ended early
        self.closed = False  # the phase after the last step is over
        self.scores: list[Scores] = []
        self.losses = LossLog(self.names)

        links = list(trainer)[::-1]  # innermost first: the order of taps
        adapt(trainer, model, len(self.names))
        same_on_all(model)
        self.compiled = compile is not None
        for name in ("featurizer", "classifier") if self.compiled else ():
            model.get_submodule(name).compile(mode=compile)  # in place: no name changes
        self.live: Weights = model.state_dict()  # aliases of the live tensors, taken once
        self.hidden: Weights = {k: v for k, v in model.named_buffers() if k not in self.live}
        weights = {k for k, _ in model.named_parameters(remove_duplicate=False)}
        self.buffer_names = frozenset(self.live.keys() - weights)
        made = {link.name: link.module(self) for link in links}
        self.extras = nn.ModuleDict({k: m for k, m in made.items() if m is not None})
        same_on_all(self.extras.to(self.device))
        self.parameters = [
            p for m in (model, self.extras) for p in m.parameters() if p.requires_grad
        ]
        self.optimizer = optimizer([p for p in model.parameters() if p.requires_grad])
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        require(rates[0] > 0, "the optimizer's first group has a learning rate of 0: all go by it")
        self.base_lr = rates[0]
        self.lr_scales = [rate / rates[0] for rate in rates]  # of each group, kept by schedules
        self.groups: dict[str, int] = {}  # of the optimizer, by link name
        for name, module in self.extras.items():
            self._add_group(name, [p for p in module.parameters() if p.requires_grad])
        self.update = Update(self.parameters, self.optimizer, scaled=precision == "fp16", clip=clip)
        self.set_schedules(0)
        self.taps: dict[str, list[Callable[..., None]]] = {
            tap: [
                getattr(k, tap) for k in links if getattr(type(k), tap) is not getattr(Trainer, tap)
            ]
            for tap in TAPS
        }
        self.tap("setup")

    def _add_group(self, name: str, parameters: list[nn.Parameter]) -> None:
        if parameters:
            self.groups[name] = len(self.optimizer.param_groups)
            self.optimizer.add_param_group({"params": parameters, "lr": self.base_lr})
            self.lr_scales.append(1.0)

    def scale_lr(self, name: str, factor: float) -> None:
        """Multiply the learning rate of the module that the link `name` trains, for good."""
        self.lr_scales[self.groups[name]] = factor

    def set_schedules(self, t: int) -> None:
        """Give every setting that follows a schedule its number of step `t`."""
        for link, curves in self.curves:
            for name, curve in curves.items():
                setattr(link, name, curve(t))

    # The way down a plane starts at the head again, so that a link sees links outside it too.
    def step(self, batch: Batch) -> Loss:
        """One update of the weights."""
        self.set_schedules(self.t)
        return self.trainer.step(self, batch)

    def prepare(self, batch: Batch) -> Batch:
        """The batch as the links make it."""
        return self.trainer.prepare(self, batch)

    def grad(self, batch: Batch) -> Loss:
        """Leave the gradients of one update in `.grad`."""
        return self.trainer.grad(self, batch)

    def loss(self, batch: Batch) -> Loss:
        """One forward pass and what every link adds to its loss."""
        return self.trainer.loss(self, batch)

    def lr(self) -> float:
        """The learning rate of this step."""
        return self.trainer.lr(self)

    def forward(self, x: Tensor, model: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """Features (N, F) and logits (N, classes) of inputs `x`, in float32.

        `model` is another of the same structure, such as one with averaged weights.
        """
        model = model or self.model
        with self.autocast():
            features = model.featurizer(x)  # type: ignore[operator]
            logits = model.classifier(features)  # type: ignore[operator]
        return features.float(), logits.float()

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of a forward pass in this run's precision."""
        return autocast(self.precision, self.device)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` to `.grad`: those of all processes, in plain units."""
        self.update.backward(loss)

    def gradients(self, loss: Tensor, *, retain: bool = False) -> list[Tensor | None]:
        """The gradients of `loss` in `run.parameters`, as `backward` would add them.

        `retain` keeps the graph for another call.
        """
        return self.update.gradients(loss, retain=retain)

    def reset_optimizer(self) -> None:
        """Forget the optimizer's moments, as a new one would; however often asked for, once."""
        self.optimizer.state.clear()

    def random(self, name: str) -> np.random.Generator:
        """Random numbers for the link `name`: a pure function of (seed, step, name).

        So a wrap that runs twice in a step draws the same, and nothing needs saving.
        """
        return np.random.default_rng([self.seed, self.t, zlib.crc32(name.encode())])

    def step_of(self, start: float, setting: str) -> int:
        """`start` as a step: a share of the run below 1, a number of steps from 1 on.

        Raises `UserError` where that is no whole step or past the end of the run.
        """
        return step_of(start, self.steps, setting)

    def evaluates_at(self, t: int) -> bool:
        """Whether candidates are evaluated after step `t`."""
        since = t - self.first_eval
        return (since >= 0 and since % self.eval_every == 0) or t == self.steps

    def tap(self, name: str, *args: Any) -> None:
        """Call every link that has this tap, innermost first; `after_fit` alone may train."""
        with torch.set_grad_enabled(name == "after_fit"):
            for tap in self.taps[name]:
                tap(self, *args)

    def candidates(self) -> dict[str, Candidate]:
        """The live weights, then those that the links offer, in the chain's order.

        Raises `UserError` where two links offer one name.
        """
        found = {"live": Candidate(self.live)}
        for link in self.trainer:
            for name, candidate in link.candidates().items():
                require(name not in found, f"{link.name!r} offers {name!r}, which is taken")
                found[name] = candidate
        return found

    def state_dict(self) -> dict[str, Any]:
        """All that changes while training: tensors (aliases), numbers, strings, lists and dicts."""
        self.losses.flush(self.t)
        return {
            "trainer": settings_of(self.trainer),
            "t": self.t,
            "evaluated": self.evaluated,
            "stop": self.stop,
            "closed": self.closed,
            "scores": self.scores,
            "losses": self.losses.state_dict(),
            "model": dict(self.live),
            "hidden": dict(self.hidden),
            "extras": dict(self.extras.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "update": self.update.state_dict(),
            "links": {link.name: link.state_dict() for link in self.trainer},
            "random": random_states(self.device),
        }

    @torch.no_grad()
    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, the global random generators too.

        Raises `UserError` for the state of another chain or model.
        """
        mine, theirs = settings_of(self.trainer), saved.get("trainer")
        require(theirs == mine, f"the checkpoint is of the chain {theirs}, the run is of {mine}")
        missing = self.state_dict().keys() - saved.keys()
        require(not missing, f"the checkpoint lacks {', '.join(sorted(missing))}")
        try:
            self.model.load_state_dict(saved["model"])
            self.extras.load_state_dict(saved["extras"])
            self.optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
            self.update.load_state_dict(saved["update"])
            for name, buffer in self.hidden.items():
                buffer.copy_(saved["hidden"][name])
        except (RuntimeError, ValueError, KeyError) as error:
            first = str(error).strip().splitlines()[-1].strip()
            raise UserError(f"the checkpoint is of another model or optimizer: {first}") from error
        self.t, self.stop, self.closed = saved["t"], saved["stop"], saved["closed"]
        self.scores, self.evaluated = list(saved["scores"]), saved["evaluated"]
        self.losses.load_state_dict(saved["losses"])
        for link in self.trainer:
            link.load_state_dict(to_device(saved["links"][link.name], self.device))
        set_random_states(saved["random"], self.device)
        self.set_schedules(max(self.t - 1, 0))  # taps and phases go by the step that they follow
