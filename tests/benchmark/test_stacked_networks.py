"""Stacks of convolutional networks as users start them."""

from __future__ import annotations

from math import prod

import pytest
import torch
from stacked_runs import settings, toy
from torch import nn

from dgavg import UserError, leave_one_domain_out
from dgavg.benchmark.campaign import run_experiments
from dgavg.benchmark.stacked import SLOW
from dgavg.models import Model


def table(runs, stack, **more):
    """Every candidate of two ResNets, after two steps."""
    return leave_one_domain_out(
        "ema_irm_basic",
        toy("resnet18"),
        model="resnet18",
        optimizer="sgd",
        holdout=["a", "c"],
        seeds=[0],
        settings={
            "trainer.irm.anneal": 0,
            "trainer.irm.weight": 0.1,
            "protocol.steps": 2,
            "protocol.eval_every": 2,
            "protocol.batch_size": 8,
            "optimizer.lr": 1e-5,
            "also_batchnorm": ["keep", "recalibrate"],
            "stack": stack,
            **more,
        },
        runs=runs,
        quiet=True,
    ).to_frame()


def compare(together, alone, near):
    for key in ("candidate", "held_out", "seed", "step", "batchnorm"):
        assert list(together[key]) == list(alone[key])
    assert len(alone) > 4
    assert list(together["loss"]) == pytest.approx(list(alone["loss"]), rel=near)
    assert list(together["accuracy"]) == pytest.approx(list(alone["accuracy"]), abs=2.5 / 12)


def test_resnets_leave_one_domain_out(tmp_path):
    compare(table(tmp_path, 2), table(tmp_path, 1), near=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resnets_leave_one_domain_out_on_a_gpu(tmp_path, precision):
    """Products round to ten bits there (TF32), in bf16 to eight."""
    alone, together = (
        table(tmp_path, stack, device="cuda", precision=precision, scoring="fp32")
        for stack in (1, 2)
    )
    compare(together, alone, near={"fp32": 0.02, "bf16": 0.1}[precision])


class Noisy(nn.Module):
    def forward(self, x):
        return x.flatten(1) + torch.rand_like(x.flatten(1))


def noisy(shape, classes):
    return Model(Noisy(), nn.Linear(prod(shape), classes))


def test_what_can_not_be_run_for_several_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match=r"several at once \(.*random.*\): write stack=1"):
        leave_one_domain_out("basic", toy("cnn"), model=noisy, runs=tmp_path, settings={"stack": 2})
    assert not list(tmp_path.rglob("config.yaml"))


def told(tmp_path, network, *words):
    words = [*words, "protocol.steps=12", "protocol.eval_every=12"] if network == "cnn" else words
    lines = []
    run_experiments([settings(tmp_path, *words, network=network)], quiet=True, tell=lines.append)
    return lines


def test_a_cpu_is_said_to_be_slow_at_it_once(tmp_path):
    assert told(tmp_path, "cnn", "stack=2").count(SLOW) == 1


@pytest.mark.parametrize(("network", "stack"), [("mlp", 4), ("cnn", 1)])
def test_what_is_not_slow_is_not_said_to_be(tmp_path, network, stack):
    assert SLOW not in told(tmp_path, network, f"stack={stack}")
