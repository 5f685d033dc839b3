"""A state is loaded by an average of its own kind alone; what only says how to go on may change."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from dgavg.averaging import (
    AnnealedMean,
    ExponentialMean,
    GaussianPosterior,
    LatestMean,
    LossValley,
    PostHocMean,
    PowerMean,
    RunningMean,
    ValidatedMean,
    WeightSubspace,
)

KINDS = (
    AnnealedMean,
    ExponentialMean,
    GaussianPosterior,
    LatestMean,
    LossValley,
    PowerMean,
    RunningMean,
    ValidatedMean,
    WeightSubspace,
)


def net():
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


def state_of(kind):
    model = net()
    average = kind(model)
    for _ in range(3):
        average.update(model)
    return average.state_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_of_any_other_kind_is_refused(kind):
    for other in KINDS:
        average = kind(net())
        if other is kind:
            average.load_state_dict(state_of(other))
            continue
        message = f"another average: kind={other.__name__} there, {kind.__name__} here"
        with pytest.raises(ValueError, match=message):
            average.load_state_dict(state_of(other))
        assert average.count == 0


@pytest.mark.parametrize(
    ("saved", "loading", "message"),
    [
        (partial(LatestMean, k=3), partial(LatestMean, k=5), "k=3 there, 5 here"),
        (partial(WeightSubspace, k=3), partial(WeightSubspace, k=5), "k=3 there, 5 here"),
        (
            partial(GaussianPosterior, rank=3),
            partial(GaussianPosterior, rank=5),
            "rank=3 there, 5 here",
        ),
        (
            partial(PowerMean, length=0.2),
            partial(PowerMean, length=0.1),
            "length=0.2 there, 0.1 here",
        ),
        (
            partial(PostHocMean, lengths=(0.05, 0.1)),
            partial(PostHocMean, lengths=(0.05, 0.2)),
            "length=0.1 there, 0.2 here",
        ),
        (
            partial(RunningMean, buffers="average"),
            partial(RunningMean, buffers="copy"),
            "1.running_mean is averaged there, copied here",
        ),
        (
            partial(LatestMean, buffers=lambda k: "copy" if "var" in k else "average"),
            partial(LatestMean, buffers="average"),
            "1.running_var is copied there, averaged here",
        ),
        (RunningMean, PostHocMean, "not the state of a post-hoc mean: it has average, calls"),
        (PostHocMean, RunningMean, "not the state of an average: it has averages, snapshots"),
    ],
)
def test_the_state_of_another_average_is_refused(saved, loading, message):
    average = loading(net())
    with pytest.raises(ValueError, match=message):
        average.load_state_dict(state_of(saved))
    assert average.count == 0


@pytest.mark.parametrize(
    ("saved", "loading"),
    [
        (partial(ExponentialMean, decay=0.9), partial(ExponentialMean, decay=0.99)),
        (partial(RunningMean, interval=2, start=1), RunningMean),
        (partial(LossValley, n_converge=2), partial(LossValley, n_converge=4)),
        (partial(WeightSubspace, centred=False), WeightSubspace),
        (partial(GaussianPosterior, var_clamp=0.1), GaussianPosterior),
    ],
)
def test_options_may_change(saved, loading):
    average = loading(net())
    average.load_state_dict(state_of(saved))
    assert average.count > 0


def test_a_state_passes_through_a_file(tmp_path):
    torch.save(state_of(RunningMean), tmp_path / "state.pt")
    average = RunningMean(net())
    average.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert average.count == 3


def test_a_mapping_with_the_same_buffers_goes_on_from_a_models_state():
    model = net()
    names = frozenset(k for k, _ in model.named_buffers())
    average = RunningMean(model.state_dict(), buffer_names=names)
    average.load_state_dict(state_of(RunningMean))
    assert average.count == 3
