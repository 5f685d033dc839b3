"""A training run small enough to repeat hundreds of times: noisy classes, batch norm, no files."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dgavg.batch import Batch
from dgavg.chain import chain
from dgavg.models import Model
from dgavg.run import Run
from dgavg.trainer import Scores, Trainer

CLASSES, SHAPE = 3, (1, 2, 2)


class ToyBatches:
    """Noisy class means, moved a little further in each domain; batch t follows from t alone.

    Batches are x (domains · rows, 1, 2, 2), 3 classes, 4 steps an epoch.
    """

    classes = CLASSES
    epoch_length = 4

    def __init__(self, domains: int = 3, rows: int = 8) -> None:
        self.names = tuple(f"domain{i}" for i in range(domains))
        self.rows = rows

    def __call__(self, t: int) -> Batch:
        """Batch `t`."""
        random = torch.Generator().manual_seed(1_000 + t)
        domains, n = len(self.names), len(self.names) * self.rows
        d = torch.arange(domains).repeat_interleave(self.rows)
        y = torch.randint(CLASSES, (n,), generator=random)
        noise = torch.randn(n, *SHAPE, generator=random)
        x = 0.5 * noise + y[:, None, None, None] * 0.6 + d[:, None, None, None] * 0.3
        return Batch(x, y, d, domains)


def toy_model(seed: int = 0) -> Model:
    """A two-layer network with batch norm for `ToyBatches`, its weights drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Flatten(), nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh()]
        return Model(nn.Sequential(*layers), nn.Linear(8, CLASSES)).train()


def toy_evaluate(run: Run) -> Scores:
    """Accuracy and loss of every candidate on one fixed batch."""
    batch, found = run.batches(10_000), {}
    for name, candidate in run.candidates().items():
        twin = copy.deepcopy(run.model)
        twin.load_state_dict(candidate.weights)
        logits = twin.eval()(batch.x)
        found[name] = {
            "accuracy": (logits.argmax(dim=1) == batch.y).float().mean().item(),
            "loss": nn.functional.cross_entropy(logits, batch.y).item(),
        }
    return found


def toy_run(
    trainer: Trainer | str,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    steps: int = 12,
    domains: int = 3,
) -> Run:
    """A run of `trainer` (a chain, or its name and the settings of its links) on the toy data.

    Evaluates every 3 steps; Adam at 1e-2; training all of it takes some ten milliseconds.
    """
    if isinstance(trainer, str):
        trainer = chain(trainer, **(settings or {}))
    torch.manual_seed(0)
    return Run(
        trainer,
        toy_model(),
        ToyBatches(domains),
        steps=steps,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
        evaluate=toy_evaluate,
        eval_every=3,
    )
