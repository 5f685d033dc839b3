"""Samples of a GaussianPosterior: their covariance, their generator, their memory."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from gaussian_paths import collected, plain_deviations, seeded, shake, walk
from torch import nn

from dgavg.averaging.gaussian import CHUNK, GaussianPosterior


def covariance(path, rank, scaling, scale, low_rank):
    """The covariance of a sample by the definitions, in float64."""
    exact = path.astype(np.float64)
    diagonal, k = np.diag(exact.var(axis=0)), min(rank, len(path))
    if rank == 0 or not low_rank:
        return {"paper": scale, "reference": scale, "dicee": scale**2}[scaling] * diagonal
    rows = plain_deviations(path, rank)[:k]
    along = rows.T @ rows
    if scaling == "paper":
        return scale * (0.5 * diagonal + 0.5 * along / max(k - 1, 1))
    if scaling == "reference":
        return scale * (diagonal + along / max(rank - 1, 1))
    return scale**2 * diagonal + along / max(k - 1, 1)


@pytest.mark.parametrize(
    ("rank", "options"),
    [
        (6, {}),
        (6, {"scale": 3.0}),
        (6, {"scaling": "reference", "scale": 0.5}),
        (6, {"scaling": "dicee", "scale": 0.5}),
        (6, {"low_rank": False, "scale": 2.0}),
        (6, {"low_rank": False, "scale": 2.0, "scaling": "reference"}),
        (6, {"low_rank": False, "scale": 2.0, "scaling": "dicee"}),
        (2, {}),
        (1, {}),
        (1, {"scaling": "reference"}),
        (0, {"scale": 2.0}),
    ],
)
def test_samples_have_the_covariance_of_the_formula(rank, options):
    """Drawn, whitened by the formula, they have the unit covariance to 5 standard errors."""
    path, n = walk(3, 4, mean=5.0), 1500
    posterior, generator = collected(path, rank=rank), seeded(0)
    drawn = [posterior.sample(generator=generator, **options)["w"] for _ in range(n)]
    off = torch.stack(drawn).double().numpy() - path.astype(np.float64).mean(axis=0)
    options = {"scaling": "paper", "scale": 1.0, "low_rank": True} | options
    values, axes = np.linalg.eigh(covariance(path, rank, **options))
    white = off @ axes / np.sqrt(values)
    standard_error = np.sqrt((1 + np.eye(4)) / n)
    assert (np.abs(white.T @ white / n - np.eye(4)) < 5 * standard_error).all()
    assert (np.abs(white.mean(axis=0)) < 5 / np.sqrt(n)).all()


def test_the_reference_at_half_scale_is_the_paper_once_the_ring_is_full():
    posterior = collected(walk(6, 50), rank=4)
    one = posterior.sample(generator=seeded(3))["w"]
    other = posterior.sample(0.5, generator=seeded(3), scaling="reference")["w"]
    torch.testing.assert_close(one, other)


def test_noise_is_independent_across_chunks():
    size = CHUNK + 5000
    live = {"w": torch.zeros(size)}
    posterior = GaussianPosterior(live, rank=0)
    for value in (-1.0, 1.0):
        live["w"].fill_(value)
        posterior.update(live)
    drawn = posterior.sample(generator=seeded(0))["w"]
    assert not drawn[:5000].equal(drawn[CHUNK:])
    assert drawn[CHUNK:].std().item() == pytest.approx(1.0, rel=0.05)
    assert drawn[CHUNK:].mean().item() == pytest.approx(0.0, abs=0.07)


@pytest.mark.parametrize("rank", [0, 1, 20])
@pytest.mark.parametrize("scaling", ["paper", "reference", "dicee"])
def test_after_one_update_a_sample_is_the_mean(rank, scaling):
    posterior = collected(walk(1, 8), rank=rank)
    assert posterior.sample(scaling=scaling)["w"].equal(posterior.mean()["w"])


def test_scale_zero_is_the_mean_to_the_bit():
    posterior = collected(walk(9, 8), rank=4)
    assert posterior.sample(0.0)["w"].equal(posterior.mean()["w"])


def test_samples_follow_from_the_state_of_the_generator():
    posterior = collected(walk(5, 300), rank=3)
    before = torch.get_rng_state()
    generator = seeded(7)
    first, second = (posterior.sample(generator=generator)["w"] for _ in range(2))
    assert torch.get_rng_state().equal(before)
    assert not first.equal(second)
    again = seeded(7)
    assert first.equal(posterior.sample(generator=again)["w"])
    assert second.equal(posterior.sample(generator=again)["w"])
    torch.manual_seed(7)
    assert first.equal(posterior.sample()["w"])  # torch's own by default


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_generator_on_the_cpu_draws_the_same_for_an_average_on_a_gpu():
    path = walk(5, CHUNK + 300)
    here, there = collected(path, rank=3), collected(path, rank=3, device="cuda")
    drawn = there.sample(generator=seeded(7))["w"]
    assert drawn.device.type == "cuda"
    torch.testing.assert_close(drawn.cpu(), here.sample(generator=seeded(7))["w"])


def test_samples_share_no_memory_with_the_average():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    posterior = GaussianPosterior(model, rank=2, buffers="average")
    for seed in range(3):
        shake(model, seed)
        posterior.update(model)
    before = copy.deepcopy(posterior.state_dict()["tensors"])
    for tensor in posterior.sample().values():
        tensor.fill_(1)
    after = posterior.state_dict()["tensors"]
    assert all(tensor.equal(after[name]) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": -0.5}, r"scale=-0.5: a number from 0 on"),
        ({"scale": float("inf")}, r"scale=inf: a number from 0 on"),
        ({"scaling": "mine"}, r"scaling='mine': choose one of paper, reference, dicee"),
    ],
)
def test_samples_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        collected(walk(3, 2)).sample(**options)
