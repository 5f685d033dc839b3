"""Predictions of a GaussianPosterior against copies of the model with each sample."""

from __future__ import annotations

import copy

import pytest
import torch
from gaussian_paths import seeded, shake
from live_bytes import LiveBytes
from torch import nn

from dgavg.averaging import recalibrate_batchnorm
from dgavg.averaging.gaussian import CHUNK, GaussianPosterior


class Tied(nn.Module):
    """Batch norm, dropout, a tied pair and a frozen batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.frozen = nn.BatchNorm1d(4)
        self.register_buffer("shift", torch.ones(4), persistent=False)

    def forward(self, x):
        return self.frozen(self.second(self.drop(self.norm(self.first(x))))) + self.shift


def posterior_of(model, updates=5):
    posterior = GaussianPosterior(model, rank=3)
    for seed in range(updates):
        random = seeded(seed)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=random))
            model.norm.running_mean += 0.5
            model.norm.running_var *= 1.5
        posterior.update(model)
    return posterior


def rows(n, seed=0):
    return torch.randn(n, 4, generator=seeded(seed))


def everything(model):
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return (
        {k: (t.data_ptr(), t.detach().clone()) for k, t in tensors.items()},
        {k: m.training for k, m in model.named_modules()},
        {k: len(m._forward_pre_hooks) for k, m in model.named_modules()},
    )


def assert_unchanged(model, before):
    tensors, modes, hooks = everything(model)
    assert (modes, hooks) == before[1:]
    for name, (place, tensor) in tensors.items():
        assert place == before[0][name][0], name
        assert tensor.equal(before[0][name][1]), name
    assert model.first.weight is model.second.weight


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("recalibrate", [True, False])
def test_predictions_are_those_of_copies_with_each_sample(recalibrate, training):
    model = Tied().train(training)
    model.frozen.eval()
    posterior = posterior_of(model)
    inputs, batches = rows(9), [rows(16, 1) * 3, rows(7, 2) + 1]
    expected, generator = [], seeded(5)
    for _ in range(4):
        twin = copy.deepcopy(model)
        twin.load_state_dict(posterior.sample(2.0, generator=generator, scaling="reference"))
        if recalibrate:
            recalibrate_batchnorm(twin, batches)
        twin.eval()
        expected.append(twin(inputs).detach().softmax(dim=1))
    before = everything(model)
    found = posterior.predict(
        model,
        inputs,
        samples=4,
        batches=batches if recalibrate else None,
        scale=2.0,
        scaling="reference",
        generator=seeded(5),
    )
    torch.testing.assert_close(found, torch.stack(expected).mean(dim=0))
    assert not found.requires_grad
    assert_unchanged(model, before)


def test_predictions_without_the_low_rank_part_are_others():
    model = Tied()
    posterior = posterior_of(model)
    drawn, generator = copy.deepcopy(model).eval(), seeded(5)
    drawn.load_state_dict(posterior.sample(generator=generator, low_rank=False))
    found = posterior.predict(model, rows(3), samples=1, generator=seeded(5), low_rank=False)
    torch.testing.assert_close(found, drawn(rows(3)).detach().softmax(dim=1))


def test_inputs_may_be_a_tensor_a_mapping_or_batches():
    model = Tied()
    posterior = posterior_of(model)

    def predict(inputs, **options):
        return posterior.predict(model, inputs, samples=2, generator=seeded(0), **options)

    x = rows(5)
    whole = predict(x)
    labelled = [(x[:2], torch.zeros(2)), (x[2:], torch.zeros(3))]
    loader = torch.utils.data.DataLoader(x, batch_size=2)
    for inputs in ({"x": x, "y": 3}, [x[:2], x[2:]], labelled, loader):
        torch.testing.assert_close(predict(inputs), whole)
    torch.testing.assert_close(predict(x / 2, forward=lambda model, batch: model(batch * 2)), whole)


def test_batches_are_passed_on_for_recalibration_as_inputs_are():
    model, posterior = Tied(), None
    posterior = posterior_of(model)
    found = [
        posterior.predict(
            model, rows(5) / k, batches=[rows(9) / k], samples=2, generator=seeded(0), forward=call
        )
        for k, call in ((1, None), (2, lambda model, batch: model(batch * 2)))
    ]
    torch.testing.assert_close(*found)


def test_a_low_precision_model_predicts_in_float32():
    model = nn.Linear(4, 3).bfloat16()
    posterior = GaussianPosterior(model)
    posterior.update(model)
    found = posterior.predict(model, rows(5).bfloat16(), samples=3)
    assert found.dtype == torch.float32
    assert found.sum(dim=1).tolist() == pytest.approx([1.0] * 5)


@pytest.mark.parametrize("where", ["inputs", "batches"])
def test_an_exception_leaves_the_model_as_it_was(where):
    model = Tied().train()
    posterior = posterior_of(model)
    before, kept = everything(model), copy.deepcopy(posterior.state_dict())

    def forward(model, batch):
        if batch.shape[0] == 1:
            raise RuntimeError("stopped")
        return model(batch)

    given = {"inputs": [rows(4)], "batches": [rows(4)]}
    given[where] = [rows(4), rows(1)]
    with pytest.raises(RuntimeError, match="stopped"):
        posterior.predict(model, forward=forward, samples=2, **given)
    assert_unchanged(model, before)
    after = posterior.state_dict()["tensors"]
    assert all(tensor.equal(after[name]) for name, tensor in kept["tensors"].items())


def test_predictions_need_no_more_than_two_further_models():
    model = nn.Sequential(nn.Linear(1000, 1000), nn.Linear(1000, 2))
    posterior = GaussianPosterior(model, rank=2)
    for seed in range(3):
        shake(model, seed)
        posterior.update(model)
    size = sum(p.numel() * 4 for p in model.parameters())
    with LiveBytes() as used:
        posterior.predict(model, torch.zeros(2, 1000), samples=3)
    assert used.peak <= 2 * size + 8 * CHUNK + 50_000


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"samples": 0}, r"samples=0: at least 1"),
        ({"inputs": []}, r"no inputs: predictions need at least one batch"),
        ({"inputs": iter([rows(2)])}, r"inputs end after one sample: give a list or a DataLoader"),
        ({"batches": iter([rows(2)])}, r"batches end after one sample: give a list"),
        ({"batches": []}, r"no batch came"),
        ({"scaling": "mine"}, r"scaling='mine'"),
    ],
)
def test_predictions_that_make_no_sense_are_refused(given, message):
    model = Tied()
    posterior = posterior_of(model)
    before = everything(model)
    with pytest.raises(ValueError, match=message):
        posterior.predict(model, **({"inputs": rows(3)} | given))
    assert_unchanged(model, before)


def test_predictions_need_an_update_and_this_model():
    model = Tied()
    with pytest.raises(ValueError, match="no weights have been averaged yet"):
        GaussianPosterior(model).predict(model, rows(3))
    with pytest.raises(ValueError, match="another model"):
        posterior_of(model).predict(nn.Linear(4, 4), rows(3))
