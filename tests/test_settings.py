"""Settings by name, optimizers and learning-rate schedules by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pytest
import torch
from torch import nn

from dgavg import UserError
from dgavg.optimizers import OPTIMIZERS, lr_schedule, optimizer_factory
from dgavg.settings import check_settings, fits


def build(
    shape, *, lr: float, size: int = 3, names: Sequence[str] = (), root: str | None = None
) -> None:
    """A function with settings."""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.1, "siez": 3}, "no setting 'siez' in data; did you mean 'size'"),
        ({"lr": 0.1, "shape": 3}, "no setting 'shape' in data"),
        ({"lr": "fast"}, "data.lr='fast' must be a number, not str"),
        ({"lr": 0.1, "size": 1.5}, "data.size=1.5 must be an integer"),
        ({"lr": 0.1, "size": True}, "data.size=True must be an integer"),
        ({"lr": 0.1, "names": "ab"}, "data.names='ab' must be a list, each item a text"),
        ({"lr": 0.1, "root": 3}, "data.root=3 must be a text or null"),
        ({}, "data.lr is missing: set it to a number"),
    ],
)
def test_settings_that_do_not_fit_a_signature_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        check_settings(build, settings, "data")


def test_settings_that_fit_pass():
    assert fits("a", Literal["a", "b"])
    assert not fits("c", Literal["a", "b"])
    check_settings(build, {"lr": 1, "size": 2, "names": ["a"], "root": None}, "data")
    assert fits([1, 2.5], list[float])
    assert not fits([1, "a"], list[float])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_by_name_takes_steps_downhill(name):
    weight = nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = optimizer_factory(name, lr=0.05)([weight])
    for _ in range(200):
        optimizer.zero_grad()
        weight.square().sum().backward()
        optimizer.step()
    assert weight.abs().max() < 0.2


def test_optimizer_settings_reach_torch():
    weight = nn.Parameter(torch.zeros(1))
    group = optimizer_factory("adamw", lr=0.1, weight_decay=0.3, beta1=0.8)([weight]).param_groups
    assert (group[0]["lr"], group[0]["weight_decay"], group[0]["betas"]) == (0.1, 0.3, (0.8, 0.999))
    sgd = optimizer_factory("sgd", lr=0.1, momentum=0.5, nesterov=True)([weight]).param_groups[0]
    assert (sgd["momentum"], sgd["nesterov"]) == (0.5, True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "adm", "lr": 1.0}, "no optimizer 'adm'; did you mean 'adam'"),
        ({"name": "adam", "lr": 0.0}, "optimizer.lr=0.0: a number above 0"),
        ({"name": "adam", "lr": 0.1, "momentum": 0.9}, "no setting 'momentum' in optimizer"),
        ({"name": "adam", "lr": 0.1, "weight_decay": -1.0}, "optimizer.weight_decay=-1.0"),
        ({"name": "sgd", "lr": 0.1, "momentum": -1.0}, r"optimizer.momentum=-1.0: a number in \[0"),
        ({"name": "adam", "lr": 0.1, "beta1": 1.5}, r"optimizer.beta1=1.5: a number in \[0, 1\)"),
        (
            {"name": "sgd", "lr": 0.1, "momentum": 0.0, "nesterov": True},
            "optimizer.nesterov=true needs optimizer.momentum above 0",
        ),
    ],
)
def test_an_optimizer_that_cannot_work_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        optimizer_factory(**settings)


def test_schedules_equal_their_formulas():
    cosine = lr_schedule("cosine", warmup=0, steps=100)
    assert [cosine(t) for t in (0, 50)] == pytest.approx([1.0, 0.5])
    assert cosine(99) < 0.001
    assert [lr_schedule("constant", 4, 100)(t) for t in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1, 1, 1]


@pytest.mark.parametrize(
    ("name", "warmup", "message"),
    [("cosin", 0, "did you mean 'cosine'"), ("cosine", 100, "optimizer.warmup=100: fewer steps")],
)
def test_a_schedule_that_cannot_work_is_refused(name, warmup, message):
    with pytest.raises(UserError, match=message):
        lr_schedule(name, warmup, steps=100)
