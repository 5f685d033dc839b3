"""Bench: batches of validation images for learned soups, and how batch norm acts meanwhile."""

from __future__ import annotations

import pytest
import torch

from dgavg.averaging.batchnorm import batchnorm_layers
from dgavg.benchmark.bench import Bench, Setup
from dgavg.data import make_splits
from dgavg.models import build_model

PROTOCOL = {"holdout_fraction": 0.2, "test_split": "in", "selection": "validation"}


@pytest.fixture
def bench(make_data):
    def make(batchnorm="recalibrate", size=10, precision="fp32"):
        setup = Setup(
            dataset=make_data([60, 70, 65]),
            model=lambda shape, classes: build_model("mlp", shape, classes, width=4, dropout=0.5),
            protocol=PROTOCOL,
            device=torch.device("cpu"),
            precision=precision,
            eval_batch_size=size,
        )
        return Bench(setup, "d1", 0, batchnorm)

    return make


def test_batches_are_passes_over_the_validation_images_alone(bench):
    found = bench()
    _, _, batches = found.learning(7)
    batches = list(batches)
    assert [len(y) for _, y in batches] == [9, 8, 8, 9, 8, 8, 9]  # 25 images, 10 at most
    dataset = found.setup.dataset
    splits = make_splits(dataset, 0.2, trial_seed=0)
    images = [dataset.domains[i].images[splits.out[i]] / 255 for i in (0, 2)]
    expected = sorted(x.flatten().tolist() for x in torch.cat(images))
    passes = [torch.cat([x for x, _ in batches[i : i + 3]]) for i in (0, 3)]
    for images in passes:
        assert sorted(x.flatten().tolist() for x in images) == expected
    assert not passes[0].equal(passes[1])


def test_images_keep_their_labels(bench):
    found = bench(size=1000)
    ((images, labels),) = list(found.learning(1)[2])
    known = {
        tuple(x.flatten().tolist()): int(y)
        for domain in found.setup.dataset.domains
        for x, y in zip(domain.images, domain.labels, strict=True)
    }
    assert [known[tuple((255 * x).round().int().flatten().tolist())] for x in images] == (
        labels.tolist()
    )


@pytest.mark.parametrize("policy", ["average", "recalibrate"])
def test_only_batch_norm_that_will_be_recalibrated_trains(policy, bench):
    model, _, _ = bench(policy).learning(1)
    layers = batchnorm_layers(model)
    assert len(layers) == 2
    assert all(layer.training == (policy == "recalibrate") for layer in layers)
    assert not any(m.training for m in model.modules() if m not in layers)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_weights_are_scored_in_the_precision_of_the_runs(precision, dtype, bench):
    found, plain = bench(precision=precision), bench()
    weights = found.model.state_dict()
    logits = found.logits(weights)
    images = torch.cat([split.images for split in found.splits.values()]).float() / 255
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        expected = found.model.eval()(images).float()
    torch.testing.assert_close(logits, expected, rtol=0.02, atol=0.02)
    with torch.no_grad():
        assert found.forward(found.model, images).equal(expected)
    assert not plain.logits(weights).equal(logits)
    assert found.forward(found.model, images).dtype == torch.float32
