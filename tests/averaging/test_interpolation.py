"""The line between two models, the loss along it, and sums of logits."""

from __future__ import annotations

import math

import pytest
import torch
from live_bytes import LiveBytes
from torch import nn

from dgavg.averaging.ensemble import ensemble
from dgavg.averaging.interpolation import interpolate, loss_barrier

ALPHAS = (-0.5, 0.0, 0.2, 0.5, 0.9, 1.0, 1.5)


def model(seed, dtype=torch.float32):
    torch.manual_seed(seed)
    return {
        "w": torch.randn(40).to(dtype),
        "phase": torch.randn(3, dtype=torch.complex64),
        "seen": torch.tensor(seed),
        "mask": torch.tensor([1.0, -torch.inf]),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_point_on_the_line_is_that_of_the_definition(alpha, dtype):
    start, end = model(3, dtype), model(4, dtype)
    found = interpolate(start, lambda: end, alpha)
    for name in ("w", "phase"):
        wide = torch.complex128 if name == "phase" else torch.float64
        exact = (1 - alpha) * start[name].to(wide) + alpha * end[name].to(wide)
        torch.testing.assert_close(found[name], exact.to(start[name].dtype))
    assert found["seen"].item() == (4 if alpha >= 0.5 else 3)
    assert found["mask"].tolist() == [1.0, -math.inf]
    assert not {v.data_ptr() for v in found.values()} & {
        v.data_ptr() for m in (start, end) for v in m.values()
    }


@pytest.mark.parametrize("alpha", [0, 1, 0.0, 1.0])
def test_the_ends_are_the_models_to_the_bit_even_if_the_other_is_broken(alpha):
    good, bad = model(0), model(1)
    bad["w"].fill_(math.nan)
    ends = (bad, good) if alpha else (good, bad)
    found = interpolate(*ends, alpha)
    assert all(found[k].equal(good[k]) for k in good)


def test_bfloat16_is_mixed_in_float32():
    start, end = ({"w": torch.tensor([v], dtype=torch.bfloat16)} for v in (1.0, 1.0078125))
    assert interpolate(start, end, 0.49)["w"].item() == 1.0  # one step apart: nothing between
    wide = {"w": torch.tensor([256.0], dtype=torch.bfloat16)}
    low = {"w": torch.tensor([-255.0], dtype=torch.bfloat16)}
    assert interpolate(wide, low, 0.5)["w"].item() == 0.5  # 256 + 255 has no bfloat16


@pytest.mark.parametrize("alpha", [math.nan, math.inf])
def test_no_number_is_refused(alpha):
    with pytest.raises(ValueError, match="a number, 0 for start and 1 for end"):
        interpolate(model(0), model(1), alpha)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match=r"end and start differ: .*1 names missing \(bias\)"):
        interpolate(nn.Linear(2, 2), nn.Linear(2, 2, bias=False), 0.5)


def number(value):
    return {"w": torch.tensor([value], dtype=torch.float64)}


def test_the_barrier_is_the_rise_above_the_line_between_the_end_losses():
    """L = (w² − 1)² + w is 1 higher between its two valleys, whose losses are −1 and 1."""
    found = loss_barrier(number(-1.0), number(1.0), lambda w: (w["w"] ** 2 - 1) ** 2 + w["w"], 5)
    assert found.alphas == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert found.losses == (-1.0, 0.0625, 1.0, 1.0625, 1.0)
    # the line is −1, −0.5, 0, 0.5, 1
    assert found.height == 1.0


def test_the_height_is_over_the_line_not_over_the_mean_of_the_ends():
    found = loss_barrier(number(0.0), number(1.0), lambda w: w["w"].item())
    assert found.height == pytest.approx(0.0, abs=1e-12)  # over the mean it would be 0.5
    assert len(found.alphas) == 11


def test_a_path_that_only_falls_has_no_barrier():
    found = loss_barrier(number(-1.0), number(1.0), lambda w: w["w"].item() ** 2)
    assert found.height == 0.0


def test_points_may_be_chosen_and_the_ends_come_along():
    seen = []
    found = loss_barrier(number(0.0), number(8.0), lambda w: seen.append(w["w"].item()) or 0.0,
                         points=[0.75, 0.5])  # fmt: skip
    assert found.alphas == (0.0, 0.5, 0.75, 1.0)
    assert seen == [0.0, 4.0, 6.0, 8.0]


def test_two_points_are_the_ends():
    assert loss_barrier(number(0.0), number(1.0), lambda w: 0.0, 2).alphas == (0.0, 1.0)


def test_a_loss_of_nan_on_the_way_is_no_low_barrier():
    def loss(w):
        return math.nan if w["w"].item() == 0.5 else 0.0

    assert math.isnan(loss_barrier(number(0.0), number(1.0), loss, 5).height)


@pytest.mark.parametrize(
    ("points", "message"), [(1, "at least 2, the ends"), ([0.5, 1.2], "values of alpha from 0 to")]
)
def test_points_off_the_line_are_refused(points, message):
    with pytest.raises(ValueError, match=message):
        loss_barrier(number(0.0), number(1.0), lambda w: 0.0, points)


def test_the_barrier_holds_two_models_and_the_one_between():
    size, loads = 100_000, []

    def load():
        loads.append(1)
        return {str(i): torch.ones(size) for i in range(10)}

    with LiveBytes() as memory:
        loss_barrier(load, load, lambda w: 0.0)
    assert len(loads) == 2
    assert memory.peak <= 3 * 10 * 4 * size + 4 * 4 * size


# Ensembles.


def test_an_ensemble_sums_logits_and_holds_one_model():
    size, inputs = 100_000, torch.randn(6, 3, dtype=torch.float64)

    def load(i):
        torch.manual_seed(i)
        return {"w": torch.randn(3, 4, dtype=torch.float64), "bulk": torch.ones(size)}

    with LiveBytes() as memory:
        found = ensemble([lambda i=i: load(i) for i in range(4)], lambda w: inputs @ w["w"])
    expected = inputs @ torch.stack([load(i)["w"] for i in range(4)]).sum(dim=0)
    torch.testing.assert_close(found, expected)
    assert memory.peak < 2 * 4 * size
    assert not found.requires_grad


def test_logits_in_half_precision_are_summed_in_float32():
    parts = [torch.tensor([[v]], dtype=torch.bfloat16) for v in (256.0, 1.0, 1.0)]
    found = ensemble([{"w": p} for p in parts], lambda w: w["w"])
    assert found.dtype == torch.float32
    assert found.item() == 258.0
    assert parts[0].item() == 256.0


def test_the_first_logits_are_not_written_into():
    logits = torch.ones(2, 2)
    ensemble([{"w": logits}, {"w": logits}], lambda w: w["w"])
    assert logits.sum().item() == 4


def test_members_of_other_architectures_are_fine():
    wide, narrow = nn.Linear(4, 2), nn.Linear(4, 2, bias=False)
    x = torch.randn(5, 4)
    found = ensemble([wide, narrow], lambda w: x @ w["weight"].T + w.get("bias", 0))
    torch.testing.assert_close(found, (wide(x) + narrow(x)).detach())


@pytest.mark.parametrize(
    ("models", "logits", "message"),
    [
        ([], lambda w: w["w"], "no models: an ensemble needs at least one"),
        ([0, 1], lambda w: torch.zeros(2, 2 + int(w["w"])), r"models\[1\] are \(2, 3\), those"),
        ([0], lambda w: [1.0], r"logits of models\[0\] are no floating tensor"),
        ([0], lambda w: torch.ones(1, 2, dtype=torch.int64), "no floating tensor"),
    ],
)
def test_what_is_no_ensemble_is_refused(models, logits, message):
    with pytest.raises(ValueError, match=message):
        ensemble([{"w": torch.tensor(v)} for v in models], logits)
