"""How weights of image networks are laid out while they train."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dgavg import Batch, Run, fit
from dgavg.benchmark.experiment import experiments
from dgavg.benchmark.fold import _Fold
from dgavg.config import compose, plain
from dgavg.models import Model, build_model
from dgavg.models.model import Featurizer, lay_out

LAST = torch.channels_last


def test_a_network_that_normalises_images_has_its_weights_channels_last():
    torch.manual_seed(0)
    model = build_model("resnet18", (3, 32, 32), 4, weights=None).eval()
    other = copy.deepcopy(model)
    lay_out(other)
    kernels = [p for p in other.parameters() if p.dim() == 4 and p.shape[1] > 1]
    assert kernels
    assert all(p.is_contiguous(memory_format=LAST) for p in kernels)
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["cnn", "mlp"])
def test_others_stay_as_they_are(name):
    model = build_model(name, (1, 8, 8), 4)
    lay_out(model)
    assert all(p.is_contiguous() for p in model.parameters())


def fused_sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, fused=True)


class Noise:
    """Batches of noise, of two domains."""

    names, classes, epoch_length = ("a", "b"), 3, 4

    def __call__(self, t):
        rng = torch.Generator().manual_seed(t)
        y = torch.randint(3, (16,), generator=rng)
        d = torch.arange(2).repeat_interleave(8)
        return Batch(torch.rand(16, 3, 8, 8, generator=rng), y, d, 2)


@pytest.mark.parametrize("link", ["basic", "andmask", "pcgrad", "fish", "sagm"])
def test_a_layout_changes_nothing_that_is_trained(link):
    """Under links that write gradients of their own, too."""

    def trained(last):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.Flatten()]
        model = Model(Featurizer(nn.Sequential(*layers), [0.5], [0.2]), nn.Linear(180, 3))
        if last:
            lay_out(model)
        spec = link if link == "basic" else f"{link}_basic"
        fit(Run(spec, model, Noise(), steps=4, optimizer=fused_sgd))
        return dict(model.named_parameters())

    torch.testing.assert_close(trained(last=True), trained(last=False), rtol=1e-4, atol=1e-5)


def test_runs_lay_their_models_out(tmp_path):
    words = ["trainer=ema_basic", "model=resnet18", "model.weights=null", f"runs={tmp_path}"]
    experiment = experiments(plain(compose([*words, "data.size=32", "protocol.steps=2"])))[0]
    fold = _Fold(experiment, ("0",), 0, tmp_path / "run", {"seed": 0, "protocol": {}})
    kernels = [v for v in fold.run.live.values() if v.dim() == 4 and v.shape[1] > 1]
    assert kernels
    assert all(v.is_contiguous(memory_format=LAST) for v in kernels)
