"""GaussianPosterior against float64 moments of stored snapshots, and what it draws."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from gaussian_paths import collected, plain_deviations, seeded, shake, walk
from live_bytes import LiveBytes
from torch import nn

from dgavg.averaging.gaussian import CHUNK, GaussianPosterior


@pytest.mark.parametrize("rank", [0, 1, 3, 20, 60])
@pytest.mark.parametrize("seed", [0, 1])
def test_moments_and_deviations_are_those_of_the_snapshots(rank, seed):
    path = walk(50, 200, seed)
    posterior = collected(path, rank=rank)
    exact = path.astype(np.float64)
    np.testing.assert_allclose(posterior.mean()["w"].numpy(), exact.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(posterior.variance()["w"].numpy(), exact.var(axis=0), rtol=1e-5)
    stored = posterior.state_dict()["tensors"]
    assert posterior.deviations == min(rank, 50)
    assert ("deviations/w" in stored) == (rank > 0)
    if rank:
        found, expected = stored["deviations/w"].numpy(), plain_deviations(path, rank)[:50]
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "counted"),
    [
        ({"start": 3}, slice(3, 10)),
        ({"interval": 4}, slice(0, 10, 4)),
        ({"start": 2, "interval": 3}, slice(2, 10, 3)),
    ],
)
def test_only_updates_that_count_are_taken_in(options, counted):
    path = walk(10, 5)
    posterior, exact = collected(path, rank=3, **options), path[counted].astype(np.float64)
    np.testing.assert_allclose(posterior.mean()["w"].numpy(), exact.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(posterior.variance()["w"].numpy(), exact.var(axis=0), rtol=1e-4)
    found = posterior.state_dict()["tensors"]["deviations/w"].numpy()
    np.testing.assert_allclose(found, plain_deviations(path[counted], 3), atol=1e-6)


def test_small_variances_about_large_means_are_right_and_never_negative():
    """Mean of squares minus square of the mean is negative for most of these in float32."""
    path = walk(50, 10_000, std=1e-4)
    naive = (path**2).mean(axis=0, dtype=np.float32) - path.mean(axis=0, dtype=np.float32) ** 2
    assert (naive < 0).mean() > 0.1
    found = collected(path, rank=0).variance()["w"].numpy()
    assert (found > 0).all()
    np.testing.assert_allclose(found, path.astype(np.float64).var(axis=0), rtol=2e-2)


def test_a_variance_is_at_least_the_clamp():
    path = np.ones((4, 3), dtype=np.float32)
    assert collected(path).variance()["w"].tolist() == pytest.approx([1e-30] * 3)
    assert collected(path, var_clamp=0.25).variance()["w"].tolist() == [0.25] * 3
    drawn = collected(path, rank=0, var_clamp=1e4).sample(generator=seeded(0))["w"]
    assert drawn.std() > 10


def big_model():
    """Tensors above and below the size of a chunk, one with its axes in another order."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(CHUNK // 2 + 7, 5), nn.Conv2d(5, 6, 3))
    model.none = nn.Parameter(torch.zeros(0, 3))
    model.gaps = nn.Parameter(torch.zeros(8, 6)[:, ::2])
    return model.to(memory_format=torch.channels_last)


def test_tensors_of_any_size_and_order_are_found_in_their_chunks():
    model = big_model()
    posterior = GaussianPosterior(model, rank=2)
    snapshots = []
    for seed in range(3):
        if seed == 2:  # the same parameters, their axes in yet another order
            model = model.to(memory_format=torch.contiguous_format)
        snapshots.append(shake(model, seed))
        posterior.update(model)
    stored = posterior.state_dict()["tensors"]
    drawn = posterior.sample(scale=0.0)
    assert drawn["2.weight"].is_contiguous(memory_format=torch.channels_last)
    for name, variance in posterior.variance().items():
        path = torch.stack([s[name] for s in snapshots]).double()
        mean = posterior.mean()[name].double()
        torch.testing.assert_close(mean, path.mean(dim=0), rtol=1e-5, atol=1e-5)
        expected = (path - path.mean(dim=0)).square().mean(dim=0)
        torch.testing.assert_close(variance.double(), expected, rtol=1e-5, atol=1e-5)
        deviations = torch.stack([path[2] - path.mean(dim=0), path[1] - path[:2].mean(dim=0)])
        found = stored[f"deviations/{name}"].double()
        torch.testing.assert_close(found, deviations, rtol=1e-5, atol=1e-5)
        assert drawn[name].equal(posterior.mean()[name])


class Zoo(nn.Module):
    """One tensor of every kind: tied, complex, bfloat16, integer, boolean, unsaved, batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.phase = nn.Parameter(torch.randn(4, dtype=torch.complex64))
        self.low = nn.Parameter(torch.zeros(5, dtype=torch.bfloat16))
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("seen", torch.tensor(7))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("hidden", torch.zeros(2), persistent=False)


@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_every_kind_of_tensor_has_its_moments_and_samples(buffers):
    model = Zoo()
    posterior = GaussianPosterior(model, rank=3, buffers=buffers)
    snapshots = []
    for seed in range(6):
        snapshots.append(shake(model, seed))
        posterior.update(model)
    mean, variance = posterior.mean(), posterior.variance()
    drawn = posterior.sample(generator=seeded(0))
    for name in snapshots[0]:
        path = torch.stack([s[name] for s in snapshots])
        statistic = name in ("norm.running_mean", "norm.running_var")
        if name in ("seen", "mask", "norm.num_batches_tracked") or (
            statistic and buffers == "copy"
        ):
            assert name not in variance
            assert drawn[name].equal(path[-1]), name
            continue
        exact = path.to(torch.complex128 if path.is_complex() else torch.float64)
        torch.testing.assert_close(mean[name], exact.mean(dim=0).to(path.dtype))
        assert variance[name].dtype == torch.float32
        expected = exact.var(dim=0, correction=0).float()
        torch.testing.assert_close(variance[name], expected, rtol=1e-5, atol=1e-5)
        assert drawn[name].equal(mean[name]) == statistic, name  # no noise in running variances
    assert drawn.keys() == snapshots[0].keys()
    assert all(t.dtype == snapshots[0][k].dtype for k, t in drawn.items())
    assert drawn["first.weight"].data_ptr() == drawn["second.weight"].data_ptr()
    assert variance["first.weight"].equal(variance["second.weight"])
    assert "hidden" not in drawn
    assert "hidden" not in variance
    model.load_state_dict(drawn)


def test_statistics_in_a_mapping_are_told_by_name_and_have_no_noise():
    model = nn.BatchNorm1d(3)
    weights = model.state_dict()
    posterior = GaussianPosterior(
        weights, buffers="average", buffer_names=frozenset({"module.running_var"})
    )
    for seed in range(4):
        shake(model, seed)
        posterior.update(weights)
    drawn, mean = posterior.sample(), posterior.mean()
    assert drawn["running_var"].equal(mean["running_var"])
    assert not drawn["running_mean"].equal(mean["running_mean"])  # not named, so a weight


def test_both_parts_of_complex_numbers_get_noise():
    live = {"z": torch.zeros(500, dtype=torch.complex64)}
    posterior = GaussianPosterior(live, rank=0)
    for value in (0.0, 2.0 + 6.0j):
        live["z"].fill_(value)
        posterior.update(live)
    noise = posterior.sample(generator=seeded(1))["z"] - (1 + 3j)
    assert noise.real.std().item() == pytest.approx(1.0, rel=0.15)
    assert noise.imag.std().item() == pytest.approx(3.0, rel=0.15)


def test_a_model_of_integers_alone_is_copied():
    live = {"steps": torch.tensor(3)}
    posterior = GaussianPosterior(live)
    posterior.update(live)
    assert posterior.sample()["steps"].item() == 3
    assert posterior.variance() == {}


def test_it_goes_on_from_its_saved_state_to_the_bit():
    path = walk(13, 40)
    live = {"w": torch.zeros(40)}
    straight = GaussianPosterior(live, rank=3)
    for i, row in enumerate(path):
        live["w"].copy_(torch.from_numpy(row))
        straight.update(live)
        if i == 4:
            saved = copy.deepcopy(straight.state_dict())
            resumed = GaussianPosterior({"w": torch.ones(40)}, rank=3)
            resumed.load_state_dict(saved)
        if i > 4:
            resumed.update(live)
    assert (resumed.calls, resumed.count, resumed.deviations) == (13, 13, 3)
    mine, theirs = straight.state_dict()["tensors"], resumed.state_dict()["tensors"]
    assert mine.keys() == {"mean/w", "m2/w", "deviations/w"}
    assert all(tensor.equal(theirs[name]) for name, tensor in mine.items())
    one, other = (p.sample(generator=seeded(0))["w"] for p in (straight, resumed))
    assert one.equal(other)


def test_the_state_of_another_rank_is_refused():
    posterior = collected(walk(3, 2), rank=3)
    with pytest.raises(ValueError, match="another average: rank=3 there, 4 here"):
        collected(walk(3, 2), rank=4).load_state_dict(posterior.state_dict())
    with pytest.raises(ValueError, match="another average: rank=3 there, 0 here"):
        collected(walk(3, 2), rank=0).load_state_dict(posterior.state_dict())


def test_after_a_restart_nothing_of_the_past_counts():
    path, live = walk(9, 30), {"w": torch.zeros(30)}
    path[:6] *= 1e6
    posterior, fresh = (GaussianPosterior(live, rank=5) for _ in range(2))
    for i, row in enumerate(path):
        live["w"].copy_(torch.from_numpy(row))
        if i == 6:
            posterior.restart()
        posterior.update(live)
        if i >= 6:
            fresh.update(live)
    assert posterior.deviations == 3
    assert posterior.mean()["w"].equal(fresh.mean()["w"])
    assert posterior.variance()["w"].equal(fresh.variance()["w"])
    one, other = (p.sample(generator=seeded(0))["w"] for p in (posterior, fresh))
    assert one.equal(other)


def test_a_model_that_changes_its_precision_is_followed():
    model = nn.Linear(4, 3)
    posterior = GaussianPosterior(model, rank=4)
    snapshots = []
    for seed, kind in enumerate([torch.float32, torch.bfloat16, torch.float64, torch.float64]):
        model.to(kind)
        snapshots.append(shake(model, seed)["weight"].double())
        posterior.update(model)
    path = torch.stack(snapshots)
    assert posterior.mean()["weight"].dtype == torch.float64
    torch.testing.assert_close(posterior.mean()["weight"], path.mean(dim=0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        posterior.variance()["weight"], path.var(dim=0, correction=0), rtol=1e-6, atol=1e-6
    )
    assert posterior.sample()["weight"].dtype == torch.float64
    assert posterior.state_dict()["tensors"]["deviations/weight"].dtype == torch.float64


def test_float64_stays_float64():
    model = nn.Linear(4, 3).double()
    posterior = GaussianPosterior(model, rank=2)
    path = []
    for seed in range(3):
        path.append(shake(model, seed)["weight"])
        posterior.update(model)
    path = torch.stack(path)
    exact = {"rtol": 1e-14, "atol": 1e-14}
    torch.testing.assert_close(posterior.mean()["weight"], path.mean(dim=0), **exact)
    found = posterior.variance()["weight"]
    torch.testing.assert_close(found, path.var(dim=0, correction=0), **exact)


def test_a_copy_holds_nothing_of_the_model():
    model = nn.Linear(99, 100)
    posterior = GaussianPosterior(model, rank=2)
    posterior.update(model)
    pickled = pickle.dumps(posterior)
    assert len(pickled) < 4.5 * 4 * 100 * 100
    assert pickle.loads(pickled).mean()["weight"].equal(model.weight)


def test_a_copy_goes_its_own_way():
    model = nn.Linear(4, 3)
    posterior = GaussianPosterior(model, rank=2)
    shake(model, 0)
    posterior.update(model)
    twin = copy.deepcopy(posterior)
    first, second = (shake(model, seed)["weight"] for seed in (1, 2))
    twin.update(model)
    torch.testing.assert_close(
        twin.mean()["weight"], (shake(model, 0)["weight"] + second) / 2, rtol=1e-6, atol=1e-5
    )
    assert posterior.count == 1
    assert posterior.mean()["weight"].equal(model.weight)
    assert not first.equal(second)


def test_deviations_may_be_kept_in_half_the_memory():
    path = walk(7, 64)
    wide, narrow = (collected(path, rank=3, deviation_dtype=d) for d in (None, torch.bfloat16))
    assert narrow.state_dict()["tensors"]["deviations/w"].dtype == torch.bfloat16
    one, other = (p.sample(generator=seeded(2))["w"] for p in (wide, narrow))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-2)
    assert not one.equal(other)
    live = {"w": torch.zeros(64, dtype=torch.float64)}
    narrow.update(live)
    assert narrow.state_dict()["tensors"]["deviations/w"].dtype == torch.bfloat16
    assert narrow.mean()["w"].dtype == torch.float64


def test_it_holds_two_models_and_a_ring_and_works_in_place():
    live = {"a": torch.randn(700, 1000), "b": torch.randn(30, 100)}
    model = sum(t.numel() * 4 for t in live.values())
    with LiveBytes() as used:
        posterior = GaussianPosterior(live, rank=4)
        assert used.peak == 6 * model
        for _ in range(3):
            posterior.update(live)
        assert used.peak <= 6 * model + 4 * CHUNK
        held, used.peak = sum(used.live.values()), 0
        posterior.sample()
        assert model <= used.peak - held <= model + 8 * CHUNK + 1000
        used.peak = 0
        posterior.variance()
        assert used.peak - held == model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": -1}, r"rank=-1: a number of deviations from 0 on"),
        ({"rank": 2.5}, r"rank=2.5: a number of deviations from 0 on"),
        ({"rank": float("inf")}, r"rank=inf: a number of deviations from 0 on"),
        ({"var_clamp": -1.0}, r"var_clamp=-1.0: the least variance, a number from 0 on"),
        ({"var_clamp": float("nan")}, r"var_clamp=nan: the least variance"),
        ({"var_clamp": float("inf")}, r"var_clamp=inf: the least variance"),
        ({"deviation_dtype": torch.int8}, r"deviation_dtype=torch.int8: choose one of None, "),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GaussianPosterior({"w": torch.zeros(2)}, **options)


@pytest.mark.parametrize("ask", ["mean", "variance", "sample"])
def test_before_the_first_update_there_is_nothing_to_give(ask):
    with pytest.raises(ValueError, match="no weights have been averaged yet"):
        getattr(GaussianPosterior({"w": torch.zeros(2)}), ask)()
