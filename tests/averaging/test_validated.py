"""ValidatedMean against lists of weights in float64, decision by decision."""

from __future__ import annotations

import copy
import io
import math

import numpy as np
import pytest
import torch
from live_bytes import LiveBytes
from torch import nn

from dgavg.averaging import RunningMean, flatten_parameters
from dgavg.averaging.validated import ValidatedMean
from dgavg.testing.contract import same


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.layer = nn.Linear(37, 5, dtype=dtype)  # vectors and what is left over of them
        self.norm = nn.BatchNorm1d(5, dtype=dtype)
        self.register_buffer("unsaved", torch.zeros(2, dtype=dtype), persistent=False)


@torch.no_grad()
def shake(model, random):
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.copy_(torch.randn(tensor.shape, generator=random, dtype=torch.float64) * 3)


def state_of(average):
    return copy.deepcopy(average.state_dict())


def plain(history, hard, sign):
    """What the average is made of after (weights, live, lookahead, average) of each decision."""
    inside, done = [], []
    for weights, live, ahead, average in history:
        if not inside:
            what = "reject" if math.isnan(live) else "first"
        elif hard and sign * live > sign * ahead and sign * live > sign * average:
            what = "hard"
        elif sign * ahead > sign * average:
            what = "soft"
        else:
            what = "reject"
        inside = {"soft": [*inside, weights], "reject": inside}.get(what, [weights])
        done.append(what)
    return inside, done


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("lower", [True, False])
def test_random_decisions_leave_the_mean_of_what_was_taken_in(hard, lower):
    random, torch_random = np.random.default_rng(0), torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(30):
        model = Net(torch.float64)
        average, history = ValidatedMean(model, hard=hard, lower=lower), []
        for _ in range(12):
            shake(model, torch_random)
            metrics = random.choice([1.0, 2.0, 3.0, math.nan], size=3, p=[0.3, 0.3, 0.3, 0.1])
            live, ahead, mean = map(float, metrics)
            scored = {k: v.clone() for k, v in average.lookahead(model).items()}
            before, count = state_of(average), average.count
            history.append((model.layer.weight.detach().clone(), live, ahead, mean))
            inside, done = plain(history, hard, -1.0 if lower else 1.0)
            found = average.decide(model, live=live, lookahead=ahead, average=mean)
            assert found == done[-1]
            assert average.count == average.calls == len(inside)
            seen.add(found)
            if found == "reject":
                assert same(state_of(average), before)
                continue
            expected = torch.stack(inside).mean(dim=0)
            torch.testing.assert_close(average.weights()["layer.weight"], expected)
            if found == "soft":
                assert same(average.weights(), scored)
                assert average.metric == ahead
                assert average.count == count + 1
            else:
                assert average.weights()["layer.weight"].equal(model.layer.weight)
                assert average.metric == live
    assert seen == {"first", "soft", "reject", *(["hard"] if hard else [])}


@pytest.mark.parametrize(
    ("metrics", "done"),
    [
        ((3, 2, 1), "hard"),
        ((3, 1, 2), "hard"),
        ((3, 3, 1), "soft"),  # a tie with the lookahead is no hard update
        ((3, 1, 3), "reject"),  # nor is one with the average
        ((2, 3, 1), "soft"),
        ((1, 3, 2), "soft"),
        ((1, 2, 2), "reject"),
        ((1, 2, 3), "reject"),
        ((math.nan, 2, 1), "soft"),
        ((3, math.nan, 1), "reject"),
        ((3, 2, math.nan), "reject"),
    ],
)
@pytest.mark.parametrize("lower", [True, False])
def test_who_wins(metrics, done, lower):
    live, ahead, mean = (-m for m in metrics) if lower else metrics
    average = ValidatedMean({"w": torch.zeros(1)}, lower=lower)
    assert average.decide({"w": torch.zeros(1)}, live=0.0) == "first"
    average.lookahead({"w": torch.ones(1)})
    model = {"w": torch.ones(1)}
    assert average.decide(model, live=live, lookahead=ahead, average=mean) == done
    expected = {"hard": 1.0, "soft": 0.5, "reject": 0.0}[done]
    assert average.weights()["w"].item() == expected


def test_without_one_of_now_the_average_has_the_metric_it_was_accepted_with():
    model = {"w": torch.zeros(1)}
    average = ValidatedMean(model)
    assert average.decide(model, live=0.5) == "first"
    assert average.decide(model, live=0.4, lookahead=0.5) == "reject"
    assert average.decide(model, live=0.4, lookahead=0.6) == "soft"
    assert average.decide(model, live=0.6, lookahead=0.3) == "reject"
    assert average.decide(model, live=0.7, lookahead=0.3) == "hard"
    assert average.decide(model, live=0.6, lookahead=0.7) == "reject"
    assert average.metric == 0.7


def test_an_average_is_never_begun_with_nan():
    model = {"w": torch.zeros(1)}
    average = ValidatedMean(model)
    assert average.decide(model, live=math.nan) == "reject"
    with pytest.raises(ValueError, match="no weights have been averaged yet"):
        average.weights()
    assert average.decide(model, live=0.1) == "first"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("flat", [True, False])
def test_what_is_accepted_is_to_the_bit_what_was_scored_and_the_lookahead_changes_nothing(
    dtype, flat
):
    model, random = Net(dtype), torch.Generator().manual_seed(1)
    if flat:
        flatten_parameters(model)
    average = ValidatedMean(model)
    shake(model, random)
    average.decide(model, live=0.0)
    for metric in range(1, 6):
        shake(model, random)
        before = state_of(average)
        scored = {k: v.clone() for k, v in average.lookahead(model).items()}
        again = average.lookahead(model)
        assert same(scored, again)
        assert scored.keys() == model.state_dict().keys()
        assert scored["norm.running_mean"].equal(model.norm.running_mean)  # of the newest
        assert same(state_of(average), before)
        average.decide(model, live=0.0, lookahead=float(metric))
        assert same(average.weights(), scored)
    assert average.state_dict()["tensors"]["layer.bias"].dtype != torch.bfloat16


def test_soft_updates_are_the_running_mean():
    model, random = Net(), torch.Generator().manual_seed(2)
    average, running = (
        ValidatedMean(model, buffers="average"),
        RunningMean(model, buffers="average"),
    )
    for metric in range(8):
        shake(model, random)
        average.lookahead(model)
        average.decide(model, live=-1.0, lookahead=float(metric))
        running.update(model)
    assert same(average.weights(), running.weights())


def test_before_the_first_the_lookahead_is_the_model():
    model, random = Net(), torch.Generator().manual_seed(3)
    average = ValidatedMean(model)
    shake(model, random)
    assert same(average.lookahead(model), dict(model.state_dict()))
    assert average.count == 0


def test_the_lookahead_that_was_scored_counts_though_the_model_has_moved():
    model = {"w": torch.zeros(1)}
    average = ValidatedMean(model)
    average.decide(model, live=0.0)
    model["w"].fill_(1.0)
    average.lookahead(model)
    model["w"].fill_(5.0)
    average.decide(model, live=0.0, lookahead=1.0)
    assert average.weights()["w"].item() == 0.5


@pytest.mark.parametrize("between", ["decide", "update", "restore"])
def test_a_lookahead_of_earlier_is_not_taken_for_one_of_now(between):
    model = {"w": torch.zeros(1)}
    average = ValidatedMean(model)
    average.decide(model, live=0.0)
    model["w"].fill_(9.0)
    average.lookahead(model)
    if between == "decide":
        average.decide(model, live=0.0, lookahead=-1.0)
    elif between == "update":
        model["w"].fill_(0.0)
        average.update(model)
    else:
        average.load_state_dict(average.state_dict())
    model["w"].fill_(3.0)
    average.decide(model, live=0.0, lookahead=1.0, average=0.0)
    assert average.weights()["w"].item() == pytest.approx(3.0 / (average.count))


def test_weights_taken_in_without_asking_have_no_metric():
    model = {"w": torch.zeros(1)}
    average = ValidatedMean(model)
    average.decide(model, live=0.5)
    model["w"].fill_(1.0)
    average.update(model)
    assert average.weights()["w"].item() == 0.5
    with pytest.raises(ValueError, match="average=None: give the metric of the average"):
        average.decide(model, live=0.9, lookahead=0.8)
    assert average.decide(model, live=0.9, lookahead=0.8, average=0.7) == "hard"
    assert average.decide(model, live=0.9, lookahead=0.8) == "reject"


def test_a_missing_lookahead_is_refused():
    model = {"w": torch.zeros(1)}
    average = ValidatedMean(model)
    average.decide(model, live=0.5)
    with pytest.raises(ValueError, match="lookahead=None: give the metric"):
        average.decide(model, live=0.9)


@pytest.mark.parametrize("accepted", [True, False])
def test_it_follows_a_model_that_moves_between_lookahead_and_decision(accepted):
    model, random = Net(), torch.Generator().manual_seed(4)
    average, inside = ValidatedMean(model), []
    for metric in range(3):
        shake(model, random)
        average.lookahead(model)
        if metric == 1:
            model.double()
        done = average.decide(model, live=-1.0, lookahead=float(metric if accepted else -metric))
        if done in ("first", "soft"):
            inside.append(model.layer.weight.detach().double().clone())
        expected = torch.stack(inside).mean(dim=0)
        found = average.weights()["layer.weight"].double()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        kinds = {t.dtype for t in average.state_dict()["tensors"].values() if t.dim() == 2}
        moved = accepted and metric >= 1  # what is rejected changes nothing
        assert kinds == {torch.float64 if moved else torch.float32}
    assert len(inside) == (3 if accepted else 1)


def test_saved_at_any_point_it_goes_on_to_the_bit():
    random, torch_random = np.random.default_rng(5), torch.Generator().manual_seed(5)
    model = Net()
    whole, parts = ValidatedMean(model), ValidatedMean(model)
    for _ in range(12):
        shake(model, torch_random)
        metrics = dict(zip(("live", "lookahead"), map(float, random.random(2)), strict=True))
        for average in (whole, parts):
            average.lookahead(model)
            average.decide(model, **metrics)
        file = io.BytesIO()
        torch.save(parts.state_dict(), file)
        file.seek(0)
        parts = ValidatedMean(model)
        parts.load_state_dict(torch.load(file, weights_only=True))
        assert same(state_of(parts), state_of(whole))


def test_restarted_it_is_as_new():
    model = {"w": torch.ones(1)}
    average = ValidatedMean(model)
    average.decide(model, live=0.9)
    average.lookahead(model)
    average.restart()
    assert average.metric is None
    model["w"].fill_(4.0)
    assert average.decide(model, live=0.1) == "first"
    assert (average.weights()["w"].item(), average.metric, average.count) == (4.0, 0.1, 1)


def test_no_more_than_two_models_are_ever_alive():
    size = 1 << 12
    model = {"w": torch.randn(size)}
    with LiveBytes() as memory:
        average = ValidatedMean(model)
        for metric in range(6):
            average.lookahead(model)
            average.decide(model, live=9.0 if metric == 3 else 0.0, lookahead=float(metric))
    assert memory.peak / (4 * size) == 2


def test_the_state_of_something_else_is_refused():
    model = {"w": torch.ones(1)}
    with pytest.raises(ValueError, match="kind=RunningMean there, ValidatedMean here"):
        ValidatedMean(model).load_state_dict(RunningMean(model).state_dict())
