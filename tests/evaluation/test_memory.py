"""Batches that the device has no memory for: scored in parts, or refused in one line."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

from dgavg import Trainer, UserError, leave_one_domain_out, trainer
from dgavg.benchmark.campaign import Failure, run_experiments
from dgavg.benchmark.experiment import experiments
from dgavg.chain import find_trainer
from dgavg.config import compose, plain
from dgavg.evaluation import Scorer, Split
from dgavg.evaluation.memory import Fitting
from dgavg.models import Model
from dgavg.trainer import Candidate

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def small_device(room, seen):
    """A forward pass as on a device with room for so many rows; `seen` gets the sizes."""

    def forward(model, x):
        seen.append(len(x))
        if len(x) > room:
            raise torch.OutOfMemoryError("no room")
        return model(x)

    return forward


def test_scores_are_those_of_a_large_device():
    model = Model(nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8)), nn.Linear(8, 3))
    splits = {
        name: Split(torch.randint(0, 256, (n, 3, 2, 2), dtype=torch.uint8), torch.arange(n) % 3)
        for name, n in {"a/out": 40, "b/out": 30}.items()
    }
    candidates = {
        "live": Candidate(model.state_dict()),
        "pair": Candidate({}, "average", (model.state_dict(), model.state_dict())),
    }
    seen: list[int] = []
    found = [
        Scorer(model, splits, list, batch_size=64, forward=forward).score(candidates)
        for forward in (small_device(64, []), small_device(10, seen))
    ]
    assert found[0] == found[1]
    assert seen[:3] == [64, 32, 16]
    assert seen[3:11] == [8] * 8
    assert max(seen[3:]) == 8  # nothing is tried twice


def test_one_row_that_does_not_fit_and_batches_that_count_are_raised():
    with pytest.raises(torch.OutOfMemoryError):
        Fitting()(small_device(0, []), nn.Identity(), torch.zeros(4, 2))
    model = nn.Identity()
    model.support = 4
    with pytest.raises(torch.OutOfMemoryError):
        Fitting()(small_device(3, []), model, torch.zeros(4, 2))


@pytest.fixture
def greedy():
    """A chain whose first step takes more memory than there is."""

    @trainer("greedy", stackable=True)
    class Greedy(Trainer):
        def step(self, run, batch):
            SEEN.append(weakref.ref(run))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        def setup(self, run):
            ALIVE.append(sum(one() is not None for one in SEEN))

    SEEN.clear()
    ALIVE.clear()
    return Greedy(find_trainer("basic")())


SEEN: list[weakref.ref] = []
ALIVE: list[int] = []


@pytest.mark.parametrize(
    ("stack", "precision", "words"),
    [
        (1, "fp32", "write precision=bf16, or lower one of protocol.batch_size below 8"),
        (2, "bf16", "lower one of stack below 2, protocol.batch_size below 8"),
    ],
)
def test_training_says_what_to_lower(greedy, stack, precision, words, tmp_path):
    with pytest.raises(UserError) as caught:
        leave_one_domain_out(
            greedy,
            seeds=[0, 1],
            settings={"holdout": ["0"], "stack": stack, "device": "cpu", "precision": precision},
            runs=tmp_path,
            quiet=True,
        )
    assert str(caught.value) == (
        f"cpu has too little memory for this: {words}, eval_batch_size (for recalibrated batch "
        "norm) below 512"
    )


def test_a_failed_run_is_let_go(greedy, tmp_path):
    settings = plain(compose(["trainer=basic", "seeds=[0]", f"runs={tmp_path}"]))
    failures: list[Failure] = []
    (done,) = experiments({**settings, "holdout": ["0"]})
    run_experiments([done], quiet=True)  # or the first failure ends it all
    more = replace(done, trainer=greedy, folds=(("0",), ("15",), ("30",), ("45",)))
    run_experiments([more], quiet=True, failures=failures)
    assert [one.fold for one in failures] == [("15",), ("30",), ("45",)]
    assert ALIVE == [0, 0, 0]


@no_gpu
def test_a_full_gpu_scores_in_parts():
    model = Model(
        nn.Sequential(nn.Conv2d(3, 64, 3), nn.Flatten()), nn.Linear(64 * 126**2, 2)
    ).cuda()
    images = torch.rand(512, 3, 128, 128, device="cuda")
    expected = torch.cat([model(part).detach() for part in images.split(16)])
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**30) / total)
    try:
        fitting = Fitting()
        with torch.inference_mode():
            found = fitting(lambda model, x: model(x), model, images)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert fitting.most is not None
    assert fitting.most < 512
    torch.testing.assert_close(found, expected)
