"""What links train beside the model, and what they change in it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from dgavg import Run, Trainer, UserError, chain, fit, trainer
from dgavg.chain import adapting
from dgavg.testing import ToyBatches, check_resume, toy_model, toy_run
from dgavg.trainers import EMA, Basic


def define_beside(frozen=False):
    @trainer("beside")
    class Beside(Trainer):
        """Trains a scale beside the model, ten times as fast."""

        def module(self, run):
            return nn.Linear(3, 3).requires_grad_(not frozen)

        def setup(self, run):
            if not frozen:
                run.scale_lr("beside", 10.0)

        def loss(self, run, batch):
            out = self.inner.loss(run, batch)
            out.terms["beside"] = run.extras["beside"](out.logits).square().mean()
            return out


def test_a_module_beside_the_model_has_a_learning_rate_of_its_own_that_follows_the_schedule():
    define_beside()
    options = {"steps": 2, "optimizer": lambda p: torch.optim.SGD(p, lr=0.1)}
    run = Run("beside_basic", toy_model(), ToyBatches(), schedule=lambda t: 0.5, **options)
    before = {k: v.clone() for k, v in run.extras["beside"].named_parameters()}
    loss = run.grad(run.batches(0))
    slopes = {k: v.grad.clone() for k, v in run.extras["beside"].named_parameters()}
    assert torch.isfinite(loss.total)
    run.step(run.batches(0))
    assert [group["lr"] for group in run.optimizer.param_groups] == [0.05, 0.5]
    for name, parameter in run.extras["beside"].named_parameters():
        torch.testing.assert_close(parameter, before[name] - 0.5 * slopes[name])


def test_without_a_rate_of_its_own_a_module_has_the_models():
    @trainer("plain")
    class Plain(Trainer):
        """Offers a module."""

        def module(self, run):
            return nn.Linear(3, 3)

    run = Run("plain_basic", toy_model(), ToyBatches(), steps=1)
    fit(run)
    assert [group["lr"] for group in run.optimizer.param_groups] == [1e-3, 1e-3]


def test_a_frozen_module_beside_the_model_needs_no_optimizer():
    define_beside(frozen=True)
    run = toy_run("beside_basic")
    assert len(run.optimizer.param_groups) == 1
    before = run.extras["beside"].weight.clone()
    fit(run)
    assert run.extras["beside"].weight.equal(before)


class Doubled(nn.Module):
    """A classifier of twice the logits, with a buffer."""

    def __init__(self, classifier):
        super().__init__()
        self.classifier = classifier
        self.register_buffer("factor", torch.tensor(2.0))

    def forward(self, features):
        return self.factor * self.classifier(features)


def define_doubles():
    @trainer("doubles")
    class Doubles(Trainer):
        """Changes the classifier."""

        def adapt(self, model, domains):
            assert domains == 3
            model.classifier = Doubled(model.classifier)


def test_a_link_may_change_the_model_before_anything_sees_it():
    define_doubles()
    plain, run = toy_run("basic"), toy_run("ema_doubles_basic", {"ema": {"decay": 0.5}})
    x = run.batches(0).x
    run.model.eval(), plain.model.eval()
    torch.testing.assert_close(run.forward(x)[1], 2 * plain.forward(x)[1])
    assert {"classifier.classifier.weight", "classifier.factor"} <= run.live.keys()
    assert any(p is run.model.classifier.classifier.weight for p in run.parameters)


def test_a_changed_model_is_averaged_and_resumed():
    define_doubles()
    check_resume("ema_doubles_basic", {"ema": {"decay": 0.5}})
    run = Run("ema_doubles_basic", toy_model(), ToyBatches(), steps=4)
    fit(run)
    assert run.candidates()["ema"].weights.keys() == run.live.keys()


def test_of_a_chain_only_the_links_that_change_the_model_are_needed_to_make_it_again():
    define_doubles()
    found = adapting({"ema": {"decay": 0.9}, "doubles": {}, "irm": {"weight": "f"}, "basic": {}})
    assert [link.name for link in found] == ["doubles", "basic"]
    assert [k.name for k in adapting({k.name: k.settings() for k in EMA(Basic())})] == ["basic"]


def test_parameters_that_the_optimizer_was_not_given_gather_no_gradients():
    def head_alone(parameters):
        return torch.optim.SGD(list(parameters)[-2:], lr=0.1)

    run = Run("basic", toy_model(), ToyBatches(), steps=4, optimizer=head_alone)
    first = run.model.featurizer[1].weight
    norms = []
    for _ in range(3):
        run.model.load_state_dict(toy_model().state_dict())
        run.grad(run.batches(0))
        norms.append(first.grad.norm().item())
    assert norms[0] == norms[1] == norms[2] > 0


def test_a_first_group_without_a_learning_rate_is_refused():
    with pytest.raises(UserError, match="first group has a learning rate of 0: all go by it"):
        Run(
            "basic", toy_model(), ToyBatches(), steps=1, optimizer=lambda p: torch.optim.SGD(p, 0.0)
        )


@pytest.mark.parametrize("spec", ["andmask_dann_basic", "pcgrad_miro_basic", "rsc_basic"])
def test_a_model_of_other_precision_trains(spec):
    batches = ToyBatches()

    class Wide:
        names, classes, epoch_length = batches.names, batches.classes, batches.epoch_length

        def __call__(self, t):
            batch = batches(t)
            return replace(batch, x=batch.x.double())

    run = Run(spec, toy_model().double(), Wide(), steps=2)
    fit(run)
    assert all(v.dtype == torch.float64 for k, v in run.model.named_parameters())


def test_who_rests_counts_in_no_clip():
    """A step of the discriminator alone is as long as `clip`, whatever the model's gradient was."""
    settings = {"d_steps": 1, "weight": 100.0}
    options = {"optimizer": lambda p: torch.optim.SGD(p, lr=1.0), "clip": 0.05}
    run = Run(chain("dann_basic", dann=settings), toy_model(), ToyBatches(), steps=2, **options)
    before = [p.detach().clone() for p in run.parameters]
    run.step(run.batches(0))
    moved = torch.cat([(p - b).flatten() for p, b in zip(run.parameters, before, strict=True)])
    assert moved.norm().item() == pytest.approx(0.05, rel=1e-3)
    assert all(p.equal(b) for p, b in zip(run.model.parameters(), before, strict=False))
