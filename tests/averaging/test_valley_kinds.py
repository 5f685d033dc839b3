"""SWAD's average: what is averaged how, which weights count, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from dgavg.averaging import ExponentialMean, RunningMean
from dgavg.averaging.valley import LossValley


def fresh(**settings):
    return LossValley({"w": torch.zeros(3, dtype=torch.float64)}, **settings)


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.layer = nn.Linear(2, 2, dtype=dtype)
        self.norm = nn.BatchNorm1d(2, dtype=dtype)


@torch.no_grad()
def fill(model, value):
    for tensor in model.state_dict().values():
        tensor.fill_(value)


@pytest.mark.parametrize("rule", ["paper", "code"])
@pytest.mark.parametrize(("buffers", "statistic"), [("copy", 9.0), ("average", 2.0)])
def test_parameters_of_the_valley_and_buffers_as_asked(rule, buffers, statistic):
    model = Net()
    valley = LossValley(model, rule=rule, n_converge=1, n_tolerance=2, buffers=buffers)
    for value, loss in ((1.0, 1.0), (3.0, 1.0), (9.0, math.inf)):
        fill(model, value)
        valley.update(model)
        valley.evaluated(model, loss)
    found = valley.weights()
    assert found["layer.weight"][0, 0].item() == 2.0
    assert found["norm.running_mean"][0].item() == statistic
    assert found["norm.num_batches_tracked"].item() == 9
    with valley.applied_to(model):
        assert model.layer.bias[0].item() == 2.0
    assert model.layer.bias[0].item() == 9.0
    valley.copy_to(model)
    assert model.layer.bias[0].item() == 2.0


def test_low_precision_weights_are_summed_in_float32():
    model = Net(torch.bfloat16)
    valley = LossValley(model, n_converge=1)
    values = [1.0, 1.0078125] * 200  # there is no bfloat16 between them
    for value in values:
        fill(model, value)
        valley.update(model)
        valley.evaluated(model, 1.0)
    assert valley.state_dict()["tensors"]["valley/layer.bias"].dtype == torch.float32
    found = valley.state_dict()["tensors"]["valley/layer.bias"][0].item()
    assert found == pytest.approx(np.mean(values), abs=1e-6)
    assert valley.weights()["layer.bias"].dtype == torch.bfloat16


@pytest.mark.parametrize("rule", ["paper", "code"])
def test_all_sums_follow_a_model_to_another_precision(rule):
    model = Net()
    valley = LossValley(model, rule=rule, n_converge=2)
    for i, loss in enumerate((1.0, 1.1, 2.0, 1.2, 1.2)):
        if i == 3:
            model.double()
        fill(model, float(i))
        valley.update(model)
        valley.evaluated(model, loss)
    tensors = valley.state_dict()["tensors"]
    assert {t.dtype for name, t in tensors.items() if "/" in name} == {torch.float64}
    expected = {"paper": [0, 1, 2, 3, 4], "code": [0, 0, 0, 1, 1, 2, 3, 4]}[rule]
    assert valley.weights()["layer.bias"][0].item() == pytest.approx(np.mean(expected))


def test_weights_of_one_sum_are_borrowed_memory():
    live = {"w": torch.zeros(3)}
    valley = LossValley(live, n_converge=1)
    for loss in (1.0, 1.0, 2.0):
        valley.update(live)
        valley.evaluated(live, loss)
        borrowed = valley.weights()["w"].data_ptr() == valley.weights()["w"].data_ptr()
        assert borrowed == (loss == 1.0)


def test_start_and_interval_choose_the_weights():
    live = {"w": torch.zeros(8)}
    valley = LossValley(live, n_converge=1, start=2, interval=2, rule="code")
    for i in range(8):
        live["w"].zero_()[i] = 1.0
        valley.update(live)
        if i == 0:
            valley.evaluated(live, 0.1)  # before the start: no minimum
        elif i % 4 == 3:
            valley.evaluated(live, 1.0)
    expected = [0, 0, 1, 0, 1, 0, 1, 0]
    found = valley.weights()["w"]
    assert (found / found.max()).tolist() != [0] * 8
    assert [int(x > 0) for x in found] == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_converge": 0}, "n_converge=0: a number of evaluations from 1 on"),
        ({"n_tolerance": 1.5}, "n_tolerance=1.5: a number of evaluations from 1 on"),
        ({"n_tolerance": math.nan}, "n_tolerance=nan: a number of evaluations from 1 on"),
        ({"n_converge": math.inf}, "n_converge=inf: a number of evaluations from 1 on"),
        ({"tolerance_ratio": -0.1}, "tolerance_ratio=-0.1: a share of the loss from 0 on"),
        ({"tolerance_ratio": math.nan}, "tolerance_ratio=nan: a share of the loss from 0 on"),
        ({"tolerance_ratio": math.inf}, "tolerance_ratio=inf: a share of the loss from 0 on"),
        ({"rule": "khanrc"}, "rule='khanrc': choose one of paper, code"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        fresh(**settings)


def test_a_loss_below_0_is_refused():
    with pytest.raises(ValueError, match=r"loss=-0\.5: a loss from 0 on"):
        fresh().evaluated({"w": torch.zeros(3)}, -0.5)


def test_numbers_may_come_as_floats_and_tensors():
    live = {"w": torch.ones(3)}
    valley = fresh(n_converge=1.0, n_tolerance=2.0, rule="code")
    valley.update(live)
    valley.evaluated(live, torch.tensor(1.0))
    assert valley.rule.state_dict()["threshold"] == 1.3
    valley = fresh(n_converge=1)
    valley.update(live)
    valley.evaluated(live, torch.tensor(1.0))
    assert valley.rule.state_dict()["lowest"] == 1.0


def test_the_state_of_something_else_is_refused():
    live = {"w": torch.ones(3)}
    valley, other = LossValley(live), LossValley(live, rule="code")
    for average in (valley, other):
        average.update(live)
    with pytest.raises(ValueError, match="rule=code there, paper here"):
        valley.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="kind=RunningMean there, LossValley here"):
        valley.load_state_dict(RunningMean(live).state_dict())
    with pytest.raises(ValueError, match=r"another model: segment/w is \(3,\), the average \(2,\)"):
        LossValley({"w": torch.ones(2)}).load_state_dict(valley.state_dict())
    with pytest.raises(ValueError, match="kind=LossValley there"):
        ExponentialMean(live).load_state_dict(valley.state_dict())
