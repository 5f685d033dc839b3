"""MIRO against its formula on a second model that stays where training started."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from plain import STEPS, assert_weights, forward, mean, risks_of, run_of, sgd, trained
from torch import nn

from dgavg import Trainer, UserError, chain, fit, trainer
from dgavg.models import build_model
from dgavg.testing import ToyBatches, check_link, toy_model
from dgavg.testing.contract import same
from dgavg.trainers.model.miro import Anchor, penalty

LAYERS = ["featurizer.1", "featurizer"]


def by_rows(live, start, variances):
    """The penalty, entry by entry of the channel."""
    total = 0.0
    for now, then, variance in zip(live, start, variances, strict=True):
        now, then = (
            now.movedim(-1 if now.dim() == 3 else 1, 0),
            then.movedim(-1 if then.dim() == 3 else 1, 0),
        )
        entries = [
            ((a - b) ** 2 / v + torch.log(v)).flatten()
            for a, b, v in zip(now, then, variance.flatten(), strict=True)
        ]
        total = total + torch.cat(entries).mean() / 2
    return total


@pytest.mark.parametrize("seed", range(3))
def test_the_penalty_and_its_gradients_are_the_formula(seed):
    random = torch.Generator().manual_seed(seed)
    shapes = [(6, 4, 3, 2), (6, 5, 4), (6, 8)]
    sizes = [(1, 4, 1, 1), (1, 1, 4), (1, 8)]
    options = {"generator": random, "dtype": torch.float64}
    live = [torch.randn(s, **options).requires_grad_() for s in shapes]
    start = [torch.randn(s, **options) for s in shapes]
    variances = [torch.rand(s, **options).add(0.1).requires_grad_() for s in sizes]
    found, expected = penalty(live, start, variances), by_rows(live, start, variances)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    slopes = [torch.autograd.grad(value, [*live, *variances]) for value in (found, expected)]
    for a, b in zip(*slopes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("layers", [None, LAYERS])
@pytest.mark.parametrize("factor", [1.0, 10.0])
def test_training_holds_on_to_the_start(layers, factor):
    """Two layers of the toy, its variances with a rate of their own, in float64."""
    options = {"weight": 0.7, "layers": layers, "lr_factor": factor}
    run = trained("miro_basic", {"miro": options})

    model, start, batches = toy_model().double(), toy_model().double().eval(), ToyBatches()
    parts = [model.featurizer[:2], model.featurizer] if layers else [model.featurizer]
    then = [start.featurizer[:2], start.featurizer] if layers else [start.featurizer]
    initial = torch.full((1, 8), 0.1 - 1e-5, dtype=torch.float64).expm1().log()
    biases = [initial.clone().requires_grad_() for _ in parts]
    optimizers = [sgd(model.parameters()), sgd(biases)]
    optimizers[1].param_groups[0]["lr"] *= factor
    for t in range(STEPS):
        batch = batches(t)
        x = batch.x.double()
        features, logits = forward(model, batch)
        live = [parts[0](x), features] if layers else [features]
        frozen = [part(x).detach() for part in then]
        variances = [F.softplus(bias) + 1e-5 for bias in biases]
        loss = mean(risks_of(logits, batch)) + 0.7 * by_rows(live, frozen, variances)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    assert_weights(run.live, model.state_dict())
    for found, expected in zip(run.extras["miro"].biases, biases, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=2e-5)
    name = "featurizer.1.weight"
    assert (run.live[name] - trained("basic").live[name]).abs().max() > 1e-3


def test_variances_begin_at_a_tenth():
    run = run_of("miro_basic")
    (variance,) = run.extras["miro"].variances()
    torch.testing.assert_close(variance, torch.full((1, 8), 0.1))


def test_the_start_never_moves_and_no_optimizer_holds_it():
    run = run_of("miro_basic", {"miro": {"weight": 5.0}}, optimizer=torch.optim.AdamW)
    before = copy.deepcopy(run.extras["miro"].start.state_dict())
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert not any(id(p) in held for p in run.extras["miro"].start.parameters())
    assert not any(p is q for p in run.extras["miro"].start.parameters() for q in run.parameters)
    fit(run)
    assert same(dict(run.extras["miro"].start.state_dict()), dict(before))
    assert not same(dict(run.model.featurizer.state_dict()), dict(before))
    run.extras.train()
    assert not any(m.training for m in run.extras["miro"].start.modules())


def test_a_run_that_goes_on_holds_on_to_the_same_start():
    run = run_of("miro_basic")
    other = toy_model(seed=5)
    again = run_of("miro_basic", model=other)
    assert not same(dict(again.extras.state_dict()), dict(run.extras.state_dict()))
    again.load_state_dict(run.state_dict())
    assert same(dict(again.extras.state_dict()), dict(run.extras.state_dict()))


def test_one_pass_of_the_model_a_gradient():
    run = run_of("miro_basic", {"miro": {"layers": LAYERS}})
    passes = []
    run.model.featurizer.register_forward_hook(lambda *_: passes.append(1))
    run.step(run.batches(0))
    assert len(passes) == 1


def test_it_is_the_shared_pass_that_counts_not_a_links_further_one():
    @trainer("more")
    class More(Trainer):
        """Passes other images through the model, after the shared pass."""

        def loss(self, run, batch):
            out = self.inner.loss(run, batch)
            run.forward(batch.x + 100.0)
            return out

    def frozen():
        model = toy_model()
        model.featurizer[2].eval()
        return model

    terms = [
        run_of(spec, model=frozen()).loss(ToyBatches()(0)).terms["miro"]
        for spec in ("miro_basic", "miro_more_basic", "more_miro_basic")
    ]
    assert terms[0].equal(terms[1])
    assert terms[0].equal(terms[2])


def test_nothing_is_held_after_a_pass_and_no_hook_stays():
    run = run_of("miro_basic", {"miro": {"layers": LAYERS}})
    loss = run.loss(run.batches(0))
    hooks = [m._forward_hooks for part in (run.model, run.extras) for m in part.modules()]
    assert not any(hooks)
    features = weakref.ref(loss.features)
    del loss
    gc.collect()
    assert features() is None


def test_an_exception_leaves_no_hook():
    run = run_of("miro_basic")
    batch = run.batches(0)
    batch.x = batch.x[:, :, :1]
    with pytest.raises(RuntimeError):
        run.loss(batch)
    assert not any(m._forward_hooks for m in run.model.modules())


def test_weight_0_is_basic():
    off = trained("miro_basic", {"miro": {"weight": 0.0}}).live
    for name, tensor in trained("basic").live.items():
        torch.testing.assert_close(off[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "options", "shape", "names", "sizes"),
    [
        (
            "resnet18",
            {},
            (3, 32, 32),
            [f"backbone.layer{i}" for i in (1, 2, 3, 4)],
            [(1, c, 1, 1) for c in (64, 128, 256, 512)],
        ),
        (
            "timm",
            {"backbone": "resnet10t"},
            (3, 32, 32),
            [f"backbone.layer{i}" for i in (1, 2, 3, 4)],
            [(1, c, 1, 1) for c in (64, 128, 256, 512)],
        ),
        (
            "timm",
            {"backbone": "tf_efficientnet_lite0"},
            (3, 32, 32),
            [f"backbone.blocks.{i}" for i in (0, 1, 2, 4, 6)],
            [(1, c, 1, 1) for c in (16, 24, 40, 112, 320)],
        ),
        (
            "timm",
            {"backbone": "test_vit"},
            (3, 160, 160),
            [f"backbone.blocks.{i}" for i in range(6)],
            [(1, 1, 64)] * 6,
        ),
        ("cnn", {}, (1, 28, 28), [""], [(1, 128)]),
    ],
)
def test_the_layers_of_known_backbones(model, options, shape, names, sizes):
    featurizer = build_model(model, shape, 3, **options).featurizer
    modes = [m.training for m in featurizer.modules()]
    anchor = Anchor(featurizer, None, torch.zeros(1, *shape))
    assert anchor.names == names
    assert [tuple(bias.shape) for bias in anchor.biases] == sizes
    assert [m.training for m in featurizer.modules()] == modes
    assert all(p.requires_grad for p in featurizer.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1.0}, "trainer.miro.weight=-1.0: a finite number from 0 on"),
        ({"lr_factor": 0.0}, "trainer.miro.lr_factor=0.0: a number above 0"),
        ({"layers": []}, r"trainer.miro.layers=\[\]: name a layer, or null for the usual ones"),
        (
            {"layers": ["featurizer.11"]},
            "no layer 'featurizer.11' in trainer.miro.layers; did you mean 'featurizer.1'",
        ),
        ({"layers": ["classifier"]}, "no layer 'classifier' in trainer.miro.layers"),
        ({"layers": ["featurizer", "featurizer"]}, "a layer twice"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        run_of("miro_basic", {"miro": settings})


def test_lr_factor_takes_no_schedule():
    with pytest.raises(UserError, match="takes a number, no schedule"):
        chain("miro_basic", miro={"lr_factor": lambda t: 1.0})


def test_low_precision_features_are_compared_in_float32():
    random = torch.Generator().manual_seed(0)
    live, start = (torch.randn(6, 8, generator=random).bfloat16() for _ in range(2))
    variances = [torch.rand(1, 8, generator=random) + 0.1]
    found = penalty([live], [start], variances)
    expected = by_rows([live.double()], [start.double()], [variances[0].double()])
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)


def test_both_sides_work_in_the_runs_precision():
    """At the start a linear layer gives the same to the bit: nothing but log 0.1 is left."""
    settings = {"weight": 1.0, "layers": ["featurizer.1"]}
    run = run_of("miro_basic", {"miro": settings}, precision="bf16")
    found = run.loss(run.batches(0)).terms["miro"]
    torch.testing.assert_close(found, torch.tensor(0.1).log() / 2)
    fit(run)


def test_no_gradient_flows_into_the_start():
    run = run_of("miro_basic")
    x = run.batches(0).x.requires_grad_()
    assert not any(layer.requires_grad for layer in run.extras["miro"](x))


def test_blended_labels_make_no_difference():
    run = run_of("miro_mixup_basic", {"mixup": {"alpha": 1.0}})
    assert run.loss(run.prepare(run.batches(0))).terms["miro"].isfinite()


def test_the_contract():
    check_link("miro", weight=5.0, layers=LAYERS)


def test_a_layer_that_gives_no_features_is_refused():
    class Unused(nn.Module):
        """Holds parts that it never calls itself."""

        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(4, 8)])

        def forward(self, x):
            return self.parts[0](x.flatten(1))

    model = toy_model()
    model.featurizer = Unused()
    with pytest.raises(UserError, match=r"'featurizer\.parts' gives no tensor \(N, C, \.\.\.\)"):
        run_of("miro_basic", {"miro": {"layers": ["featurizer.parts"]}}, model=model)
