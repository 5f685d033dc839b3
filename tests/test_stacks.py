"""Which runs stand in a stack together, and what a link sees of one of them."""

from __future__ import annotations

import torch

from dgavg import Trainer, fit, trainer
from dgavg.benchmark.campaign import _units
from dgavg.benchmark.experiment import experiments
from dgavg.benchmark.stacked import stacks
from dgavg.config import compose, plain
from dgavg.data import TrainingBatches, load, make_splits
from dgavg.data.stacked import StackedBatches
from dgavg.models import build_model
from dgavg.models.stack import Stack
from dgavg.stacked import StackedRun


def test_runs_of_as_many_domains_stand_in_a_stack_together(tmp_path):
    words = ["trainer=basic", "seeds=[0,3]", "holdout=[0,[0,45],45,[15,30]]", "stack=3"]
    (experiment,) = experiments(plain(compose([*words, f"runs={tmp_path}"])))
    found = [[len(fold) for fold, _ in members] for members in stacks(experiment)]
    assert found == [[1, 1, 1], [1], [2, 2, 2], [2]]
    every = [(fold, seed) for fold in experiment.folds for seed in experiment.seeds]
    units = [member for unit in _units(experiment) for member in unit.members]
    assert sorted(units) == sorted(every)


def test_a_link_sees_the_domains_of_its_run_counted_from_0():
    seen = []

    @trainer("looks", stackable=True)
    class Looks(Trainer):
        """Remembers which domains it was given."""

        def loss(self, run, batch):
            seen.append((batch.d.tolist(), batch.domains))
            return self.inner.loss(run, batch)

    dataset = load("digits_rotated", angles=[0, 30, 60])
    splits = make_splits(dataset, 0.2, trial_seed=0)
    parts = [
        TrainingBatches(dataset, splits, train, batch_size=2, seed=0, device="cpu")
        for train in ([0, 1], [1, 2], [0, 2])
    ]
    stack = Stack([build_model("mlp", dataset.input_shape, 10, width=8).train() for _ in parts])
    batches = StackedBatches(dataset, parts, ["p", "q", "r"], torch.device("cpu"))
    fit(StackedRun("looks_basic", stack, batches, steps=1))
    assert seen == 3 * [([0, 0, 1, 1], 2)]
