"""Recalibration of every kind of layer and wrapped model, against NumPy float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

from dgavg.averaging.batchnorm import (
    batchnorm_layers,
    batchnorm_recalibration,
    recalibrate_batchnorm,
    statistics_layers,
)


def normal(*shape, seed=0, scale=1.0, shift=3.0):
    return torch.from_numpy(np.random.default_rng(seed).normal(shift, scale, shape).astype("f"))


def pooled(tensors):
    """Mean and unbiased variance per channel of all rows."""
    arrays = [t.detach().double().numpy() for t in tensors]
    rows = [np.moveaxis(a, 1, 0).reshape(a.shape[1], -1) for a in arrays]
    values = np.concatenate(rows, axis=1)
    return values.mean(axis=1), values.var(axis=1, ddof=1)


def by_sample(tensors):
    """Means over all samples of each one's mean and unbiased variance per channel."""
    samples = [s.reshape(s.shape[0], -1) for t in tensors for s in t.double().numpy()]
    return (
        np.mean([s.mean(axis=1) for s in samples], axis=0),
        np.mean([s.var(axis=1, ddof=1) for s in samples], axis=0),
    )


def assert_statistics(layer, expected, rtol=1e-6):
    np.testing.assert_allclose(layer.running_mean.double().numpy(), expected[0], rtol=rtol)
    np.testing.assert_allclose(layer.running_var.double().numpy(), expected[1], rtol=rtol)


INSTANCE = {
    nn.InstanceNorm1d: [(9, 4, 5), (2, 4, 5), (5, 4, 8)],
    nn.InstanceNorm2d: [(9, 4, 3, 5), (2, 4, 3, 5), (5, 4, 6, 6)],
    nn.InstanceNorm3d: [(9, 4, 3, 5, 2), (2, 4, 3, 5, 2), (5, 4, 2, 2, 2)],
}


@pytest.mark.parametrize("kind", INSTANCE)
def test_instance_norm_takes_the_means_over_all_samples(kind):
    shapes = INSTANCE[kind]
    batches = [normal(*s, seed=i, shift=10 * i, scale=1 + i) for i, s in enumerate(shapes)]
    layer = kind(4, track_running_stats=True)
    recalibrate_batchnorm(layer, batches)
    assert_statistics(layer, by_sample(batches))


def test_instance_norm_over_one_batch_is_torch_s():
    x = normal(6, 3, 4, 4)
    mine, theirs = (nn.InstanceNorm2d(3, momentum=1.0, track_running_stats=True) for _ in range(2))
    theirs(x)
    recalibrate_batchnorm(mine, [x])
    torch.testing.assert_close(mine.running_mean, theirs.running_mean)
    torch.testing.assert_close(mine.running_var, theirs.running_var)


def test_instance_norm_of_samples_without_a_batch():
    samples = [normal(4, 5, seed=i, shift=i) for i in range(3)]
    layer = nn.InstanceNorm1d(4, track_running_stats=True)
    recalibrate_batchnorm(layer, samples)
    assert_statistics(layer, by_sample([s[None] for s in samples]))


def test_instance_norm_normalises_by_the_sample_meanwhile():
    model = nn.Sequential(nn.InstanceNorm1d(3, track_running_stats=True), nn.BatchNorm1d(3))
    model[0].running_mean.fill_(100.0)
    x = normal(8, 3, 6)
    expected = nn.InstanceNorm1d(3)(x)
    recalibrate_batchnorm(model.eval(), [x])
    torch.testing.assert_close(model[1].running_var.double(), torch.tensor(pooled([expected])[1]))
    out = model[0](x)  # evaluation mode: by the running statistics
    mean, var = (torch.tensor(v).float()[:, None] for v in by_sample([x]))
    torch.testing.assert_close(out, (x - mean) / torch.sqrt(var + model[0].eps))


def test_frozen_instance_norm_stays_and_normalises_as_it_did():
    model = nn.Sequential(nn.InstanceNorm1d(3, track_running_stats=True), nn.BatchNorm1d(3))
    model[0].eval().running_mean.fill_(4.0)
    x = normal(8, 3, 6)
    recalibrate_batchnorm(model, [x])
    assert model[0].running_mean.tolist() == [4.0] * 3
    assert model[0].running_var.tolist() == [1.0] * 3
    expected = (x - 4.0) / np.sqrt(1 + model[0].eps)
    torch.testing.assert_close(model[1].running_mean.double(), torch.tensor(pooled([expected])[0]))


@pytest.mark.parametrize("affine", [False, True])  # torch itself only warns of the former
def test_an_input_of_other_channels_leaves_instance_norm_as_it_was(affine):
    model = nn.Sequential(nn.InstanceNorm1d(3, affine=affine, track_running_stats=True))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    buffers = dict(model.named_buffers())
    with pytest.raises(ValueError, match=r"^a InstanceNorm1d of 3 channels got \(4, 4, 5\)$"):
        recalibrate_batchnorm(model, [normal(4, 3, 5), normal(4, 4, 5)])
    assert model[0].track_running_stats
    assert all(model.get_buffer(k) is v for k, v in buffers.items())
    assert model.state_dict().keys() == before.keys()
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())


def test_which_layers_keep_statistics():
    model = nn.Sequential(
        nn.BatchNorm1d(3),
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.InstanceNorm1d(3),
        nn.InstanceNorm1d(3, track_running_stats=True),
        nn.SyncBatchNorm(3),
        nn.LayerNorm(3),
    )
    assert statistics_layers(model) == [model[0], model[3], model[4]]
    assert batchnorm_layers(model) == [model[0], model[4]]


def test_sync_batch_norm():
    model = nn.Sequential(nn.SyncBatchNorm(3), nn.BatchNorm1d(3)).train()
    batches = [normal(9, 3), normal(4, 3, seed=1, shift=20)]
    hidden = [nn.BatchNorm1d(3)(x) for x in batches]
    recalibrate_batchnorm(model, batches)
    assert_statistics(model[0], pooled(batches))
    torch.testing.assert_close(model[1].running_var.double(), torch.tensor(pooled(hidden)[1]))
    assert [m.training for m in model] == [True, True]
    assert [m.num_batches_tracked.item() for m in model] == [0, 0]


@pytest.mark.parametrize("kind", [nn.LazyBatchNorm1d, nn.LazyInstanceNorm1d])
def test_a_layer_without_a_size_is_refused_by_name(kind):
    model = nn.Sequential(nn.Flatten(), kind(track_running_stats=True))
    message = rf"^layer '1' \({kind.__name__}\) has no size yet: run one batch through the model"
    with pytest.raises(ValueError, match=message):
        recalibrate_batchnorm(model, [normal(4, 3, 5)])
    assert model.training


def test_a_lazy_layer_that_has_run_is_as_any_other():
    layer, x = nn.LazyBatchNorm1d(), normal(8, 3)
    layer(x + 5)
    recalibrate_batchnorm(layer, [x])
    assert_statistics(layer, pooled([x]))


def test_a_chosen_layer_without_statistics_is_refused():
    model = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False))
    with (
        pytest.raises(ValueError, match=r"^layer '0' \(BatchNorm1d\) keeps no running statistics"),
        batchnorm_recalibration(model, layers=list(model)),
    ):
        pass


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moments_of_a_low_precision_model_are_exact_but_for_the_last_rounding(dtype):
    """Sums in bfloat16 would stop growing at 256 rows."""
    layer = nn.BatchNorm1d(3).to(dtype)
    batches = [normal(n, 3, seed=n, scale=0.5).to(dtype) for n in (5000, 17, 900)]
    recalibrate_batchnorm(layer, batches)
    for found, expected in zip(
        (layer.running_mean, layer.running_var), pooled(batches), strict=True
    ):
        torch.testing.assert_close(found, torch.tensor(expected).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_of_a_float32_layer(dtype):
    """As under autocast."""
    layer = nn.BatchNorm2d(3)
    batches = [normal(n, 3, 2, 2, seed=n).to(dtype) for n in (500, 17)]
    recalibrate_batchnorm(layer, batches)
    assert_statistics(layer, pooled(batches))


def test_channels_last_inputs():
    layer, x = nn.BatchNorm2d(5), normal(7, 5, 3, 4).contiguous(memory_format=torch.channels_last)
    recalibrate_batchnorm(layer, [x])
    assert_statistics(layer, pooled([x]))


def test_an_input_without_channels_is_refused():
    with pytest.raises(ValueError, match=r"^a BatchNorm1d of 3 channels got \(3,\)$"):
        recalibrate_batchnorm(nn.BatchNorm1d(3), [normal(3)])


def test_a_batch_of_no_rows_counts_for_nothing():
    layer, x = nn.BatchNorm1d(3), normal(8, 3)
    recalibrate_batchnorm(layer, [x[:0], x, x[:0]])
    assert_statistics(layer, pooled([x]))
    with pytest.raises(ValueError, match="no batch came"):
        recalibrate_batchnorm(layer, [x[:0]])


def test_one_row_in_all_has_no_variance():
    class SkipsOne(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x) if len(x) > 1 else x  # torch refuses to normalise one row

    layer = SkipsOne(3)
    recalibrate_batchnorm(layer, [normal(1, 3)])
    assert layer.running_mean.tolist() == normal(1, 3)[0].tolist()
    assert layer.running_var.tolist() == [0.0] * 3


def test_what_torch_refuses_to_normalise_is_refused_in_its_words():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        recalibrate_batchnorm(nn.BatchNorm1d(3), [normal(8, 3), normal(1, 3)])
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        recalibrate_batchnorm(nn.InstanceNorm1d(3, track_running_stats=True), [normal(8, 3, 1)])


def test_an_input_given_by_name():
    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(input=x)

    model, x = ByName(), normal(8, 3)
    recalibrate_batchnorm(model, [x])
    assert_statistics(model.norm, pooled([x]))


def test_the_input_is_taken_as_the_layer_gets_it():
    layer, x = nn.BatchNorm1d(3), normal(8, 3)
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 10,))
    recalibrate_batchnorm(layer, [x])
    assert_statistics(layer, pooled([x * 10]))


@pytest.mark.parametrize("norm", [spectral_norm, parametrizations.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_spectral_norm_makes_no_power_iteration(norm):
    model = nn.Sequential(norm(nn.Linear(4, 3)), nn.BatchNorm1d(3)).train()
    model(normal(8, 4))
    before = {k: v.clone() for k, v in model[0].state_dict().items()}
    assert any(k.endswith("_u") for k in before)
    recalibrate_batchnorm(model, [normal(8, 4)])
    assert all(v.equal(before[k]) for k, v in model[0].state_dict().items())


class NormWithDropout(nn.BatchNorm1d):
    """As timm's BatchNormAct2d: a batch norm with parts of its own."""

    def __init__(self, features):
        super().__init__(features)
        self.drop = nn.Dropout(0.9)

    def forward(self, x):
        return self.drop(super().forward(x))


def test_parts_of_a_batch_norm_are_in_evaluation_mode():
    model, x = nn.Sequential(NormWithDropout(3), nn.BatchNorm1d(3)).train(), normal(50, 3)
    recalibrate_batchnorm(model, [x])
    hidden = nn.BatchNorm1d(3)(x)
    torch.testing.assert_close(model[1].running_var.double(), torch.tensor(pooled([hidden])[1]))
    assert all(m.training for m in model.modules())


def test_overridden_mode_switches_are_not_called():
    """Some models fold or freeze weights there."""

    class Folds(nn.Sequential):
        def train(self, mode=True):
            raise AssertionError("train() was called")

    model, x = Folds(nn.BatchNorm1d(3)), normal(8, 3)
    recalibrate_batchnorm(model, [x])
    assert_statistics(model[0], pooled([x]))


def compiled_whole(model, backend):
    return torch.compile(model, backend=backend)


def compiled_in_place(model, backend):
    model.compile(backend=backend)
    return model


@pytest.mark.parametrize("compiled", [compiled_whole, compiled_in_place])
def test_a_compiled_model_is_recalibrated_without_compiling_anew(compiled):
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    torch.compiler.reset()
    layer = nn.BatchNorm1d(3)
    model = compiled(nn.Sequential(layer, nn.Linear(3, 2)), backend)
    for mode in (True, False, True):
        model.train(mode)(normal(8, 3))
    before = len(compilations)
    assert before >= 2
    for seed in (1, 2):
        x = normal(8, 3, seed=seed, shift=10 * seed)
        recalibrate_batchnorm(model, [x])
        assert_statistics(layer, pooled([x]))
    model(normal(8, 3))
    assert model.training
    assert len(compilations) == before


def test_data_parallel_comes_back_as_it_was():
    inner = nn.Sequential(nn.BatchNorm1d(3))
    model = nn.DataParallel(inner)
    model.device_ids, model.module = [0, 1], inner  # as on two GPUs
    with batchnorm_recalibration(model):
        assert model.device_ids == [0]
        inner(normal(8, 3))
    assert model.device_ids == [0, 1]


def test_a_model_without_such_layers_is_left_alone():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).train()
    with batchnorm_recalibration(model):
        pass
    assert all(m.training for m in model.modules())


def test_chosen_layers_outside_the_model_come_back_too():
    model, other = nn.Linear(2, 2), nn.BatchNorm1d(3).eval()
    with batchnorm_recalibration(model, [other]):
        assert other.training
        other(normal(8, 3))
    assert not other.training
    assert other.track_running_stats


@pytest.mark.parametrize("momentum", [None, 0.0, 0.3])
def test_momentum_makes_no_difference(momentum):
    layer, batches = nn.BatchNorm1d(3, momentum=momentum), [normal(8, 3), normal(2, 3, shift=9)]
    layer.num_batches_tracked.fill_(7)
    recalibrate_batchnorm(layer, batches)
    assert_statistics(layer, pooled(batches))
    assert layer.momentum == momentum
    assert layer.num_batches_tracked.item() == 7
