"""`applied_to` lends a model the average and takes it back; `attach` counts real steps only."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from trajectories import assert_same, small_net, snapshot, wander

from dgavg.averaging import ExponentialMean, LatestMean, RunningMean, recalibrate_batchnorm


def averaged(model, kind=RunningMean, updates=3, **options):
    average = kind(model, **options)
    for step in range(updates):
        wander(model, step)
        average.update(model)
    return average


@pytest.mark.parametrize("kind", [RunningMean, LatestMean])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_in_the_block_the_model_has_the_average_and_afterwards_its_own(kind, dtype):
    model = small_net().to(dtype) if not dtype.is_complex else nn.Linear(3, 70, dtype=dtype)
    average = averaged(model, kind)
    expected = {k: v.clone() for k, v in average.weights().items()}
    tensors, places = list(model.parameters()), [p.data_ptr() for p in model.parameters()]
    before = snapshot(model)
    with average.applied_to(model):
        assert_same(snapshot(model), expected, rtol=0)
        assert all(p is q for p, q in zip(model.parameters(), tensors, strict=True))
    assert_same(snapshot(model), before, rtol=0)
    assert [p.data_ptr() for p in model.parameters()] == places


def test_the_model_is_its_own_again_after_an_exception():
    model = small_net()
    average = averaged(model)
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt), average.applied_to(model):
        raise KeyboardInterrupt
    assert_same(snapshot(model), before, rtol=0)


def test_the_model_is_its_own_again_after_an_exception_on_the_way_in():
    class Broken(RunningMean):
        def _means(self):
            raise MemoryError

    model = small_net()
    average = averaged(model, Broken)
    before = snapshot(model)
    with pytest.raises(MemoryError), average.applied_to(model):
        pass
    assert_same(snapshot(model), before, rtol=0)


def test_before_the_first_update_that_counts_the_model_stays():
    model = small_net()
    average = RunningMean(model, start=3)
    average.update(model)
    before = snapshot(model)
    wander(model, 1)
    with average.applied_to(model):
        assert not model[0].weight.equal(before["0.weight"])
        wander(model, 2)
        after = snapshot(model)
    assert_same(snapshot(model), after, rtol=0)  # nothing was swapped, so nothing is taken back


def test_nothing_done_in_the_block_reaches_the_average_or_lasts():
    model = small_net()
    average = averaged(model)
    before, kept = snapshot(model), {k: v.clone() for k, v in average.weights().items()}
    with average.applied_to(model):
        recalibrate_batchnorm(model, [torch.randn(8, 2, 5, 5)])
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        wander(model, 9)
    assert_same(snapshot(model), before, rtol=0)
    assert_same(average.weights(), kept, rtol=0)


def test_buffers_and_parameters_that_the_block_replaces_come_back():
    model = small_net()
    average = averaged(model)
    mean, weight, values = model[1].running_mean, model[0].weight, snapshot(model)
    with average.applied_to(model):
        model[1].running_mean = model[1].running_mean + 1
        model[0].weight = nn.Parameter(model[0].weight + 1)
        del model[3].bias
    assert model[1].running_mean is mean
    assert model[0].weight is weight
    assert_same(snapshot(model), values, rtol=0)


def test_a_cache_that_grew_in_the_block_stays():
    model = nn.Linear(2, 2)
    model.register_buffer("cache", torch.zeros(2), persistent=False)
    model.register_buffer("later", None, persistent=False)
    average = averaged(model)
    with average.applied_to(model):
        model.cache = torch.zeros(5)
        model.later = torch.zeros(5)
    assert model.cache.shape == model.later.shape == (5,)


def test_tied_weights_stay_tied_in_the_block():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = nn.Parameter(torch.zeros(0))
    model[1].weight.data = model[0].weight.data  # tied by memory, not by object
    average = averaged(model)
    with average.applied_to(model):
        assert model[0].weight.data_ptr() == model[1].weight.data_ptr()
    assert model[0].weight.data_ptr() == model[1].weight.data_ptr()


def test_gradients_and_optimizer_go_on_after_the_block():
    def train(swap):
        model = small_net()
        average = ExponentialMean(model)
        optimizer = torch.optim.Adam(model.parameters())
        for step in range(4):
            optimizer.zero_grad()
            random = torch.Generator().manual_seed(step)
            model(torch.randn(4, 2, 5, 5, generator=random)).square().mean().backward()
            if swap:
                with average.applied_to(model), torch.no_grad():
                    model.eval()(torch.ones(4, 2, 5, 5))
                model.train()
            optimizer.step()
            average.update(model)
        return snapshot(model)

    assert_same(train(swap=True), train(swap=False), rtol=0)


def test_two_averages_may_be_nested():
    model = small_net()
    first, second = averaged(model), averaged(model, LatestMean, k=2)
    before = snapshot(model)
    with first.applied_to(model):
        with second.applied_to(model):
            assert_same(snapshot(model), second.weights(), rtol=0)
        assert_same(snapshot(model), first.weights(), rtol=0)
    assert_same(snapshot(model), before, rtol=0)


def test_another_model_is_refused_untouched():
    average = averaged(small_net())
    other = nn.Linear(2, 2)
    before = snapshot(other)
    with pytest.raises(ValueError, match="another model"), average.applied_to(other):
        pass
    assert_same(snapshot(other), before, rtol=0)


def test_a_twin_in_another_precision_leaves_the_average_as_it_is():
    """Written to or lent, a narrow twin does not narrow the average."""
    model, twin = small_net(), small_net().bfloat16()
    for kind in (RunningMean, LatestMean):
        average = averaged(model, kind)
        kept = {k: v.clone() for k, v in average.state_dict()["tensors"].items()}
        average.copy_to(twin)
        with average.applied_to(twin):
            assert twin[0].weight.dtype == torch.bfloat16
        assert_same(average.state_dict()["tensors"], kept, rtol=0)
        assert average.weights()["0.weight"].dtype == torch.float32


def test_the_block_leaves_no_memory_behind():
    model = small_net()
    average = averaged(model)
    with average.applied_to(model):
        storages = [weakref.ref(p.data.untyped_storage()) for p in model.parameters()]
    gc.collect()
    assert [s() for s in storages] == [None] * len(storages)


OPTIMIZERS = [
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "fused": True}),
    (torch.optim.Adam, {"lr": 0.1}),
    (torch.optim.Adam, {"lr": 0.1, "fused": True}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
def test_steps_that_a_scaler_skips_are_not_counted(kind, options):
    model = nn.Linear(2, 1)
    optimizer = kind(model.parameters(), **options)
    average = RunningMean(model)
    average.attach(optimizer, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    seen = []
    for factor in (1.0, torch.inf, 2.0, torch.nan, 3.0):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(3, 2)).sum() * factor).backward()
        before = model.weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        if factor in (1.0, 2.0, 3.0):
            assert not model.weight.equal(before)
            seen.append(model.weight.detach().clone())
        assert average.calls == average.count == len(seen)
    torch.testing.assert_close(average.weights()["weight"], torch.stack(seen).mean(dim=0))


def test_accumulated_batches_are_one_step_and_the_handle_ends_it():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = RunningMean(model, start=1, interval=2)
    handle = average.attach(optimizer, model)
    for batch in range(12):
        model(torch.ones(1, 2)).sum().backward()
        if batch % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert (average.calls, average.count) == (6, 3)
    handle.remove()
    optimizer.step()
    assert average.calls == 6
