"""Averaged buffers with infinities, which come and go: without a mean, the newest counts."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from dgavg.averaging import (
    ExponentialMean,
    GaussianPosterior,
    LatestMean,
    LossValley,
    PowerMean,
    RunningMean,
    ValidatedMean,
    WeightSubspace,
)
from dgavg.averaging.posthoc import PostHocMean

INF = torch.inf
KINDS = {
    "running": RunningMean,
    "exponential": partial(ExponentialMean, decay=0.5),
    "latest": partial(LatestMean, k=9),
    "power": PowerMean,
    "valley": LossValley,
    "validated": ValidatedMean,
    "gaussian": GaussianPosterior,
    "subspace": partial(WeightSubspace, k=9),
}


def masked():
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.zeros(3))
    return model


@pytest.fixture(params=KINDS)
def seen(request):
    """An average and its model, after a mask that got infinities, and one that lost it again."""
    model = masked()
    average = KINDS[request.param](model, buffers="average")
    for mask in ([0.0, 2, 0], [-INF, 2, -INF], [-INF, 2, 0], [-INF, 2, 0]):
        model.mask.copy_(torch.tensor(mask))
        model.weight.data.add_(1)
        average.update(model)
    return average, model


def test_a_buffer_without_a_mean_is_the_newest_one(seen):
    average, model = seen
    assert average.weights()["mask"].tolist() == [-INF, 2, 0]
    target = masked()
    average.copy_to(target)
    assert target.mask.tolist() == [-INF, 2, 0]
    model.mask.fill_(7)  # the live one goes on: the average is what it was
    assert average.weights()["mask"].tolist() == [-INF, 2, 0]
    with average.applied_to(model):
        assert model.mask.tolist() == [-INF, 2, 0]
    assert model.mask.tolist() == [7, 7, 7]


def test_it_is_so_after_a_resume(seen):
    average, model = seen
    again = type(average)(model, buffers="average", **options(average))
    again.load_state_dict(average.state_dict())
    model.mask.fill_(7)
    assert again.weights()["mask"].tolist() == [-INF, 2, 0]


def options(average):
    return {"k": average.k} if hasattr(average, "k") else {}


def test_the_other_numbers_of_the_buffer_are_averaged():
    model = masked()
    average = RunningMean(model, buffers="average")
    for value in (1.0, 3.0):
        model.mask.copy_(torch.tensor([-INF, value, torch.nan]))
        average.update(model)
    found = average.weights()["mask"]
    assert found[:2].tolist() == [-INF, 2]
    assert found[2].isnan()


def test_a_mask_in_double_precision_on_a_complex_and_a_named_buffer():
    source = {"w": torch.ones(2), "m": torch.zeros(2).double(), "c": torch.zeros(1) * 1j}
    average = RunningMean(source, buffers="average", buffer_names=frozenset("mc"))
    for value in (0, -INF, -INF):
        source["m"][0] = value
        source["c"].real.fill_(value)
        average.update(source)
    assert average.weights()["m"].tolist() == [-INF, 0]
    assert average.weights()["c"].real.tolist() == [-INF]
    assert average.weights()["m"].dtype == torch.float64


def test_a_lookahead_has_the_mask_of_the_model():
    model = masked()
    average = ValidatedMean(model, buffers="average")
    for _ in range(2):
        average.update(model)
        model.mask.fill_(-INF)
    average.update(model)
    assert average.lookahead(model)["mask"].tolist() == [-INF] * 3


def test_samples_and_variances_of_a_gaussian_stay_finite_elsewhere():
    model = masked()
    average = GaussianPosterior(model, buffers="average", var_clamp=0.25)
    for value in (0, -INF, -INF):
        model.mask[1] = value
        average.update(model)
    assert average.sample()["mask"].tolist() == [0, -INF, 0]
    assert average.variance()["mask"].tolist() == [0.25] * 3


def test_post_hoc_averages_have_the_newest_mask():
    model = masked()
    average = PostHocMean(model, buffers="average", snapshot_every=2)
    for value in (0, 0, -INF, -INF, -INF):
        model.mask[1] = value
        average.update(model)
    assert average.weights(0.1)["mask"].tolist() == [0, -INF, 0]


def test_a_subspace_trains_beside_a_mask(seen):
    average, _ = seen
    if isinstance(average, WeightSubspace):
        assert average.basis().isfinite().all()


def test_running_statistics_are_not_kept_twice_and_hide_no_nan():
    """They are never masks: NaN there is a run that blew up."""
    model = nn.BatchNorm1d(2)
    average = RunningMean(model, buffers="average")
    average.update(model)
    assert average.tracked.guarded == []
    names = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert average.state_dict()["tensors"].keys() == names
    model.running_var.fill_(torch.nan)
    average.update(model)
    model.running_var.fill_(1.0)
    average.update(model)
    assert average.weights()["running_var"].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.bfloat16, torch.float64])
def test_masks_of_any_precision(dtype):
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.zeros(3).to(dtype))
    average = RunningMean(model, buffers="average")
    for value in (0.0, -INF, -INF):
        model.mask.copy_(torch.tensor([2.0, value, 0.0]))
        average.update(model)
    assert average.weights()["mask"].dtype == dtype
    assert average.weights()["mask"].float().tolist() == [2.0, -INF, 0.0]
    average.copy_to(model)
