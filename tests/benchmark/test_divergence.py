"""A loss that is not finite ends the run in one line, and the last good checkpoint stays."""

from __future__ import annotations

import pytest
import torch

from dgavg import Trainer, UserError, leave_one_domain_out, trainer
from dgavg.benchmark.files import load_checkpoint
from dgavg.chain import find_trainer
from dgavg.models import Model


@pytest.fixture
def bomb():
    """A link whose term becomes infinite at step 19."""

    @trainer("bomb")
    class Bomb(Trainer):
        def loss(self, run, batch):
            out = self.inner.loss(run, batch)
            out.terms["bomb"] = out.total * (float("inf") if run.t == 19 else 1.0)
            return out

    return Bomb(find_trainer("basic")())


@pytest.fixture
def poison():
    """A link that ruins the weights right after step 15, before the evaluation at 16."""

    @trainer("poison")
    class Poison(Trainer):
        def after_step(self, run):
            if run.t == 16:
                for weights in run.live.values():
                    if weights.is_floating_point():
                        weights.fill_(float("nan"))

    return Poison(find_trainer("basic")())


def last_good(run, step):
    saved = load_checkpoint(run / "checkpoint.pt")
    assert saved["run"]["t"] == step
    assert all(t.isfinite().all() for t in saved["run"]["model"].values())
    assert not (run / "done").exists()
    return run / "checkpoint.pt"


def test_the_step_and_the_term_are_named(bomb, train, tmp_path, only_run):
    with pytest.raises(UserError) as caught:
        train(bomb)
    path = last_good(only_run(tmp_path), 16)
    assert str(caught.value) == (
        "step 19: the term 'bomb' is inf; try a lower optimizer.lr or a smaller weight (hold out "
        f"d1, seed 0; the last good checkpoint, of step 16, is {path})"
    )


def test_ruined_weights_are_never_a_checkpoint(poison, train, tmp_path, only_run, records_of):
    with pytest.raises(UserError) as caught:
        train(poison)
    path = last_good(only_run(tmp_path), 8)
    assert str(caught.value) == (
        "step 16: the validation loss of the live weights is nan; try a lower optimizer.lr or a "
        f"smaller weight (hold out d1, seed 0; the last good checkpoint, of step 8, is {path})"
    )
    assert [r["step"] for r in records_of(only_run(tmp_path))] == [8]


def test_a_model_that_the_held_out_domain_alone_upsets_goes_on(make_data, tmp_path):
    """Else the held-out domain would decide where training ends."""

    class Picky(torch.nn.Flatten):
        def forward(self, x):
            return super().forward(x) * torch.where(x.mean() > 0.99, float("nan"), 1.0)

    data = make_data([60, 70, 65])
    data.domains[1].images.fill_(255)

    def model(shape, classes):
        return Model(Picky(), torch.nn.Linear(64, classes))

    table = leave_one_domain_out(
        "basic",
        data,
        model=model,
        settings={"protocol.steps": 8, "protocol.eval_every": 8},
        seeds=[0],
        holdout=["d1"],
        runs=tmp_path,
        quiet=True,
    )
    assert table.to_frame()["loss"].item() == float("inf")
