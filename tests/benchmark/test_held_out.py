"""Nothing measured on the held-out domain reaches training, stopping or selection."""

from __future__ import annotations

import pytest
import torch

from dgavg.data import Domain, DomainDataset

CHAIN = "ma_sma_ema_swa_swad_aswa_irm_mixup_basic"
SETTINGS = {
    "trainer.irm.anneal": 10,
    "trainer.sma.start": 4,
    "trainer.swa.start": 6,
    "optimizer.lr": 0.05,
}


@pytest.fixture
def data(make_data):
    return make_data([60, 70, 65])


@pytest.fixture
def noise(data):
    """The same, with the domain d1 made noise in images and labels."""
    rng = torch.Generator().manual_seed(9)
    images = torch.randint(0, 256, data.domains[1].images.shape, generator=rng, dtype=torch.uint8)
    labels = torch.randint(0, 3, (70,), generator=rng)
    replaced = Domain("d1", images, labels)
    return DomainDataset("toy", (data.domains[0], replaced, data.domains[2]), data.classes)


def final(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)["run"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("candidate", [None, "live", "ema"])
def test_noise_in_the_held_out_domain_changes_no_weight_and_no_choice(
    candidate, train, data, noise, only_run, weights_of
):
    settings = {**SETTINGS, "stopping.candidate": candidate, "stopping.patience": 1}
    (one, a), (two, b) = (
        train(CHAIN, d, folder=name, steps=400, every=10, **settings)
        for name, d in (("a", data), ("b", noise))
    )
    run_a, run_b = only_run(a), only_run(b)
    assert same(final(run_a)["model"], final(run_b)["model"])
    assert final(run_a)["t"] == final(run_b)["t"]
    assert (final(run_a)["t"] < 400) == (candidate is not None)  # it did stop, where asked to
    kept_a, kept_b = weights_of(run_a), weights_of(run_b)
    assert kept_a.keys() == kept_b.keys() >= {"live", "ma", "sma", "ema", "swa", "swad", "aswa"}
    assert all(same(kept_a[name], kept_b[name]) for name in kept_a)
    frames = one.to_frame(), two.to_frame()
    assert list(frames[0]["step"]) == list(frames[1]["step"])
    assert list(frames[0]["validation"]) == list(frames[1]["validation"])
    assert list(frames[0]["accuracy"]) != list(frames[1]["accuracy"])  # noise it was


def test_the_oracle_rule_reads_the_held_out_domain_to_select_and_for_nothing_else(
    train, data, noise, only_run, records_of
):
    settings = {**SETTINGS, "protocol.selection": "oracle_best"}
    (one, a), (two, b) = (
        train(CHAIN, d, folder=name, steps=60, every=6, **settings)
        for name, d in (("a", data), ("b", noise))
    )
    assert same(final(only_run(a))["model"], final(only_run(b))["model"])
    assert list(one.to_frame()["step"]) != list(two.to_frame()["step"])
    trained = [
        [
            {k: s for k, s in c["splits"].items() if not k.startswith("d1/")}
            for r in records_of(only_run(folder))
            for c in r["candidates"].values()
        ]
        for folder in (a, b)
    ]
    assert trained[0] == trained[1]


def test_links_and_stopping_are_told_nothing_of_the_held_out_domain(train, data, noise, only_run):
    told = [
        final(only_run(train(CHAIN, d, folder=name, evaluate="all", **SETTINGS)[1]))["scores"]
        for name, d in (("a", data), ("b", noise))
    ]
    assert told[0] == told[1]
    assert told[0][-1].keys() >= {"live", "ema", "swa"}
