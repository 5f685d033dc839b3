"""Batch-norm recalibration against moments of all rows in NumPy float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from dgavg.averaging import batchnorm_recalibration, recalibrate_batchnorm


def moments(rows):
    """Mean and unbiased variance per channel of all values of (N, C, ...) arrays."""
    channels = [np.moveaxis(r.astype(np.float64), 1, 0).reshape(r.shape[1], -1) for r in rows]
    values = np.concatenate(channels, axis=1)
    return values.mean(axis=1), values.var(axis=1, ddof=1)


def state(model):
    """Everything that recalibration might touch but must restore."""
    flags = {
        name: {k: v for k, v in vars(m).items() if not k.startswith("_")}
        for name, m in model.named_modules()
    }
    hooks = {name: len(m._forward_pre_hooks) for name, m in model.named_modules()}
    return flags, hooks


def statistics(model):
    return {k: v.clone() for k, v in model.named_buffers()}


def same(one, other):
    return one.keys() == other.keys() and all(v.equal(other[k]) for k, v in one.items())


DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    ),
]

SHAPES = {
    "(N, C)": (nn.BatchNorm1d, ()),
    "(N, C, L)": (nn.BatchNorm1d, (5,)),
    "(N, C, H, W)": (nn.BatchNorm2d, (2, 3)),
    "(N, C, D, H, W)": (nn.BatchNorm3d, (2, 1, 3)),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
def test_statistics_are_the_moments_of_all_rows_however_they_are_batched(shape, device):
    kind, rest = SHAPES[shape]
    random = np.random.default_rng(0)
    sizes = (16, 3, 9, 2)
    rows = [random.normal(50 * i, 1 + i, (n, 4, *rest)).astype("f") for i, n in enumerate(sizes)]
    layer = kind(4).to(device)
    recalibrate_batchnorm(layer, [torch.from_numpy(r) for r in rows])
    mean, var = moments(rows)
    np.testing.assert_allclose(layer.running_mean.cpu().numpy(), mean, rtol=1e-6)
    np.testing.assert_allclose(layer.running_var.cpu().numpy(), var, rtol=1e-6)
    assert layer.num_batches_tracked.item() == 0


def test_a_thousand_zeros_and_eight_tens():
    """torch's update_bn gives mean 5.0 and variance 0 here."""
    layer = nn.BatchNorm1d(1)
    recalibrate_batchnorm(layer, [torch.zeros(1000, 1), torch.full((8, 1), 10.0)])
    values = np.array([0.0] * 1000 + [10.0] * 8)
    assert layer.running_mean.item() == pytest.approx(values.mean(), rel=1e-6)
    assert layer.running_var.item() == pytest.approx(values.var(ddof=1), rel=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_no_digits_are_lost_far_from_zero(device):
    """E[x²] − E[x]² in float32 would give a variance of about zero, or below it."""
    rows = np.random.default_rng(0).normal(1000.0, 0.1, (4, 500, 1)).astype("f")
    layer = nn.BatchNorm1d(1).to(device)
    recalibrate_batchnorm(layer, list(torch.from_numpy(rows)))
    assert layer.running_var.item() == pytest.approx(moments(list(rows))[1].item(), rel=1e-5)


def test_no_digits_are_lost_over_many_small_batches():
    rows = np.random.default_rng(0).normal(1e4, 0.1, (500, 2, 1)).astype("f")
    layer = nn.BatchNorm1d(1)
    recalibrate_batchnorm(layer, list(torch.from_numpy(rows)))
    assert layer.running_var.item() == pytest.approx(moments(list(rows))[1].item(), rel=1e-4)


def test_a_float64_model_keeps_float64_moments():
    rows = torch.randn(40, 3, dtype=torch.float64) + 1000.0
    layer = nn.BatchNorm1d(3).double()
    recalibrate_batchnorm(layer, rows.split(16))
    np.testing.assert_allclose(layer.running_mean.numpy(), rows.numpy().mean(axis=0), rtol=1e-14)


def test_a_channel_that_never_moves_has_no_variance():
    """0.1 is no binary fraction: rounding must not give a negative variance, or a positive one."""
    layer = nn.BatchNorm1d(4)
    recalibrate_batchnorm(layer, [torch.full((n, 4), 0.1) for n in (1000, 3, 77)])
    assert layer.running_var.tolist() == [0.0] * 4
    torch.testing.assert_close(layer.running_mean, torch.full((4,), 0.1), rtol=0, atol=0)


def test_a_layer_used_twice_takes_both_uses():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x):
            return self.norm(x), self.norm(x + 10)

    model, x = Twice(), torch.randn(20, 2)
    recalibrate_batchnorm(model, [x])
    mean, _ = moments([x.numpy(), x.numpy() + 10])
    np.testing.assert_allclose(model.norm.running_mean.numpy(), mean, rtol=1e-5)


def test_deeper_layers_see_inputs_normalised_by_the_batch():
    """One batch: the second layer's input is exactly what training mode gives it."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.BatchNorm1d(4))
    model[1].running_mean.fill_(100.0)  # wrong statistics that must not matter
    x = torch.randn(30, 3)
    recalibrate_batchnorm(model, [x])
    hidden = model[0](x).detach().numpy().astype(np.float64)
    hidden = (hidden - hidden.mean(axis=0)) / np.sqrt(hidden.var(axis=0) + model[1].eps)
    mean, var = moments([np.maximum(hidden, 0)])
    np.testing.assert_allclose(model[3].running_mean.numpy(), mean, rtol=1e-4)
    np.testing.assert_allclose(model[3].running_var.numpy(), var, rtol=1e-4)


def test_only_batch_norm_is_in_training_mode_while_it_lasts():
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(3)).train()
    x = torch.randn(10, 3)
    with batchnorm_recalibration(model):
        assert [m.training for m in model] == [False, True]
        assert torch.equal(model[0](x), x)
        model(x)
    torch.testing.assert_close(model[1].running_mean, x.mean(dim=0))
    assert [m.training for m in model] == [True, True]


def test_frozen_layers_stay_as_they_are_and_normalise_as_they_did():
    frozen, live = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    frozen.running_mean.fill_(4.0)
    model = nn.Sequential(frozen.eval(), live)
    before, x = statistics(frozen), torch.randn(20, 3)
    recalibrate_batchnorm(model, [x])
    assert same(statistics(frozen), before)
    expected = ((x - 4.0) / np.sqrt(1 + frozen.eps)).mean(dim=0)
    torch.testing.assert_close(live.running_mean, expected)
    assert not frozen.training


def test_a_model_in_evaluation_mode_is_recalibrated_and_stays_in_it():
    model = nn.Sequential(nn.BatchNorm1d(2)).eval()
    recalibrate_batchnorm(model, [torch.randn(50, 2) + 5])
    assert model[0].running_mean.min() > 4
    assert not model[0].training


def test_in_evaluation_mode_layers_without_gradients_are_frozen_if_others_have_some():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2), nn.BatchNorm1d(2, affine=False))
    model[0].requires_grad_(False)
    recalibrate_batchnorm(model.eval(), [torch.randn(50, 2) + 5])
    assert model[0].running_mean.tolist() == [0.0, 0.0]
    assert model[1].running_mean.min() > 4
    assert model[2].num_batches_tracked == 0
    assert model[2].running_mean.abs().min() > 0
    recalibrate_batchnorm(model.requires_grad_(False), [torch.randn(50, 2) + 5])  # for inference
    assert model[0].running_mean.min() > 4


def test_a_model_that_is_all_frozen_is_left_alone():
    model = nn.Sequential(nn.BatchNorm1d(3)).train()
    model[0].eval()
    before = statistics(model)
    recalibrate_batchnorm(model, [torch.randn(5, 3)])
    recalibrate_batchnorm(model, [])
    assert same(statistics(model), before)


def test_layers_may_be_chosen():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2)).eval()
    x = torch.randn(9, 2) + 3
    with batchnorm_recalibration(model, layers=[model[1], model[1]]):
        model(x)
    assert model[0].running_mean.tolist() == [0.0, 0.0]
    _, var = moments([x.numpy() / np.sqrt(1 + model[0].eps)])
    np.testing.assert_allclose(model[1].running_var.numpy(), var, rtol=1e-5)
    model[1].reset_running_stats()
    recalibrate_batchnorm(model, [x], layers=[model[1]])
    assert model[0].running_mean.tolist() == [0.0, 0.0]
    np.testing.assert_allclose(model[1].running_var.numpy(), var, rtol=1e-5)


def test_a_head_that_no_batch_reaches_keeps_its_statistics():
    """As the auxiliary head of an Inception, which runs in training mode alone."""

    class Aux(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.aux = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

        def forward(self, x):
            return self.main(x) + (self.aux(x) if self.training else 0)

    model, x = Aux(), torch.randn(8, 2) + 5
    model.aux.running_mean.fill_(3.0)
    recalibrate_batchnorm(model, [x])
    torch.testing.assert_close(model.main.running_mean, x.mean(dim=0))
    assert model.aux.running_mean.tolist() == [3.0, 3.0]
    assert model.aux.running_var.tolist() == [1.0, 1.0]


def mixed_model():
    """Modes, momenta and flags of several kinds."""
    model = nn.Sequential(
        nn.BatchNorm1d(3, momentum=0.3),
        nn.Sequential(nn.BatchNorm1d(3, momentum=None), nn.Dropout(0.5)).eval(),
        nn.BatchNorm1d(3, track_running_stats=False),
        nn.Dropout(0.5).eval(),
        nn.Linear(3, 3),
    )
    model[0].num_batches_tracked.fill_(5)
    return model


def test_modes_flags_and_momenta_are_as_before():
    model = mixed_model()
    before = state(model)
    recalibrate_batchnorm(model, [torch.randn(6, 3)])
    assert state(model) == before
    assert model[0].num_batches_tracked.item() == 5


def test_an_exception_leaves_statistics_and_modes_as_before():
    model = mixed_model()
    before, old = state(model), statistics(model)
    with pytest.raises(ValueError, match=r"^a BatchNorm1d of 3 channels got \(6, 4\)$"):
        recalibrate_batchnorm(model, [torch.randn(6, 3), torch.randn(6, 4)])
    assert state(model) == before
    assert same(statistics(model), old)


def test_no_batches_are_refused_with_the_statistics_as_before():
    model = mixed_model()
    before, old = state(model), statistics(model)
    with pytest.raises(ValueError, match="recalibrated, but no batch came"):
        recalibrate_batchnorm(model, [])
    assert state(model) == before
    assert same(statistics(model), old)


def test_batches_of_any_kind_are_fed_as_told():
    layer, x = nn.BatchNorm1d(2), torch.randn(7, 2)
    recalibrate_batchnorm(layer, [{"x": x}], forward=lambda model, batch: model(batch["x"]))
    torch.testing.assert_close(layer.running_mean, x.mean(dim=0))


def test_recalibration_makes_no_graph():
    layer = nn.BatchNorm1d(2)
    outputs = []
    recalibrate_batchnorm(
        layer, [torch.randn(4, 2)], forward=lambda model, x: outputs.append(model(x))
    )
    with batchnorm_recalibration(layer):
        outputs.append(layer(torch.randn(4, 2)))
    assert not any(out.requires_grad for out in outputs)
    assert torch.is_grad_enabled()
