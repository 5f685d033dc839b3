"""Soups and ensembles of chains with a link that changes the model: it is made again."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from soups import assert_close, images_of, mean_of, only, record_of
from torch import nn

from dgavg import Trainer, trainer
from dgavg.models import build_model
from dgavg.trainer import fixed

BASE = (
    "model.width=8 model.batchnorm=false protocol.steps=20 protocol.eval_every=20 holdout=[0] "
    "seeds=[0] device=cpu data.angles=[0,30,60] data.size=8"
)


class Scaled(nn.Module):
    """A classifier whose logits are scaled by a number for each training domain, on average."""

    def __init__(self, classifier, times, domains):
        super().__init__()
        self.classifier = classifier
        self.times = times  # in no tensor
        self.factors = nn.Parameter(torch.ones(domains))

    def forward(self, features):
        return self.times * self.factors.mean() * self.classifier(features)


@pytest.fixture(autouse=True)
def _scales():
    @trainer("scales")
    class Scales(Trainer):
        """Scales the logits."""

        times: float = fixed(2.0)

        def adapt(self, model, domains):
            model.classifier = Scaled(model.classifier, self.times, domains)


def train(dgavg, **runs):
    for name, words in runs.items():
        dgavg(f"{words} {BASE} name={name}")


SCALES = "trainer=scales_basic trainer.scales.times=0.5"


def expected_logits(weights, images):
    model = build_model("mlp", (1, 8, 8), 10, width=8, batchnorm=False)
    model.classifier = Scaled(model.classifier, 0.5, 2)
    model.load_state_dict(weights)
    with torch.no_grad():
        return model.eval()(images)


@pytest.mark.parametrize("command", ["soup", "ensemble --candidate live"])
def test_the_changed_model_is_made_again(command, dgavg, tmp_path, digits):
    train(dgavg, a=SCALES, b=f"{SCALES} optimizer.lr=0.003")
    dgavg(f"{command} runs=soups")
    folder = only(tmp_path / "soups")
    states = [load_file(tmp_path / f"runs/{x}/0/0/weights/live.safetensors") for x in "ab"]
    ((x, y),) = images_of(digits, "0", 0, "test")
    if command == "soup":
        weights = load_file(folder / "0/0/weights/soup.safetensors")
        assert weights["classifier.factors"].shape == (2,)
        assert_close(weights, mean_of(states))
        logits = expected_logits(weights, x)
    else:
        logits = sum(expected_logits(weights, x) for weights in states) / 2
    (scores,) = record_of(folder, "0", 0)["candidates"].values()
    found = scores["splits"]["0/in"]
    assert found["accuracy"] == (logits.argmax(1) == y).sum().item() / len(y)
    loss = nn.functional.cross_entropy(logits, y).item()
    assert found["loss"] == pytest.approx(loss, rel=1e-5)  # which `times` decides, too


def test_other_links_around_it_may_differ(dgavg, tmp_path):
    train(dgavg, a=SCALES, b=f"{SCALES.replace('scales_', 'ema_scales_')} optimizer.lr=0.003")
    dgavg("soup runs=soups")
    assert len(record_of(only(tmp_path / "soups"), "0", 0)["members"]) == 2


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ("trainer=basic", "trainer.scales={'times': 0.5} there, None here"),
        ("trainer=scales_basic", "trainer.scales.times=0.5 there, 2.0 here"),
    ],
)
def test_runs_of_differently_changed_models_are_refused(other, difference, dgavg, tmp_path):
    train(dgavg, a=SCALES, b=other)
    _, error = dgavg("soup runs=soups", status=2)
    assert error == (
        f"dgavg: b and a differ in links that change the model ({difference}): a soup is of runs "
        "that share it; name the folders of those\n"
    )
    assert not (tmp_path / "soups").exists()


def test_arms_contexts_start_alike_and_score_in_batches_of_their_own(dgavg, tmp_path):
    """One `init_seed` fixes what a link adds too; an ensemble scores members as their runs did."""
    words = f"{BASE.replace('seeds=[0]', 'seeds=[0,1]')} trainer=arm_basic init_seed=0 runs=a"
    dgavg(f"{words} name=one protocol.steps=1 optimizer.lr=1e-9")
    starts = [load_file(p) for p in sorted((tmp_path / "a/one").rglob("live.safetensors"))]
    assert len(starts) == 2
    for name, tensor in starts[0].items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(tensor, starts[1][name], rtol=0, atol=1e-6)
    dgavg(f"{words} name=two")
    dgavg(f"{words} name=three optimizer.lr=1e-3")
    dgavg("ensemble a/two a/three --candidate live runs=b name=both eval_batch_size=7")
    record = record_of(tmp_path / "b/both", "0", 0)
    for member in record["members"]:
        own = record_of(tmp_path / "a" / member["run"], "0", 0)["candidates"]["live"]["splits"]
        assert member["splits"]["0/in"]["loss"] == pytest.approx(own["0/in"]["loss"], rel=1e-5)


def test_a_sweep_over_a_number_that_changes_no_model_is_taken(dgavg, tmp_path):
    for ema in ("0.99", "0.5"):
        dgavg(f"{BASE} trainer=mtl_basic trainer.mtl.ema={ema} runs=a name=ema{ema}")
    dgavg("soup a --candidate live runs=b name=both")
    assert len(record_of(tmp_path / "b/both", "0", 0)["members"]) == 2
