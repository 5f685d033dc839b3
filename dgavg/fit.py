"""The training loop, on one screen."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from dgavg.gather import average_statistics
from dgavg.run import Run
from dgavg.trainer import Trainer

FLUSH = 50  # steps between two looks at the losses: often enough to see, too rare to cost


def fit(
    run: Run,
    *,
    after_step: Callable[[Run], None] = lambda run: None,
    after_eval: Callable[[Run], None] = lambda run: None,
) -> None:
    """Train `run` from where it stands to its end, or to where early stopping ends it.

    `after_step` and `after_eval` only watch: a progress bar, a checkpoint.

    Raises `NonFiniteLossError`.
    """
    with named_link(run):
        while not run.stop:
            if run.evaluates_at(run.t) and run.t > run.evaluated:
                evaluate(run)
                after_eval(run)
            elif run.t < run.steps:
                step(run)
                after_step(run)
            else:
                break
        if run.taps["after_fit"] and not run.closed:
            run.tap("after_fit")
            run.closed = True
            evaluate(run)
            after_eval(run)


def step(run: Run) -> None:
    """One step, and what follows it: a look at the losses now and then, the links' taps."""
    if run.compiled:
        # what the last step gave is read no more
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
    run.losses.write(run.step(run.batches(run.t)))
    average_statistics(run.model, run.extras)
    run.t += 1
    run.tap("after_step")
    if run.t % run.epoch_length == 0:
        run.tap("after_epoch")
    if run.t % FLUSH == 0:
        run.losses.flush(run.t)


def evaluate(run: Run) -> None:
    """Score the candidates, tell the links, and decide whether to go on."""
    run.losses.flush(run.t)
    run.evaluated = run.t
    if run.evaluate is not None:
        found = run.evaluate(run)
        run.scores.append({k: {m: float(x) for m, x in v.items()} for k, v in found.items()})
        run.tap("after_eval", run.scores[-1])
        run.stop = run.stop or run.stopping(run.scores)


@contextmanager
def named_link(run: Run) -> Iterator[None]:
    """Note on an exception in which link of the chain it was raised."""
    try:
        yield
    except Exception as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        owners = [frame.f_locals.get("self") for frame in frames]
        inside = [owner for owner in owners if isinstance(owner, Trainer)]
        if inside:
            names = [f"[{k.name}]" if k is inside[-1] else k.name for k in run.trainer]
            error.add_note(f"in trainer chain {' > '.join(names)}")
        raise
