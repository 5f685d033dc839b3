"""MixStyle: a loop over rows and maps, and what hooks on a live model must not do."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from plain import STEPS, assert_weights, erm, plain_training, run_of, sgd, trained
from torch import nn

from dgavg import Run, Trainer, UserError, chain, fit, trainer
from dgavg.averaging import recalibrate_batchnorm
from dgavg.models import Model, build_model
from dgavg.seeding import random_state
from dgavg.testing import ToyBatches, check_link
from dgavg.trainers.batch.mixstyle import restyled

MAPS = ["featurizer.0", "featurizer.2"]


class Pictures(ToyBatches):
    """Images (2, 5, 6)."""

    shape = (2, 5, 6)

    def __call__(self, t):
        batch = super().__call__(t)
        random = torch.Generator().manual_seed(t)
        noise = torch.randn(len(batch.y), *self.shape, generator=random)
        return replace(batch, x=noise * (1 + batch.d[:, None, None, None]) + batch.d.max())


def conv_model():
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 2)]
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return Model(nn.Sequential(*layers, *pool), nn.Linear(3, 3)).train()


def mixing(layers=MAPS, model=None, domains=3, rows=4, spec="mixstyle_basic", **settings):
    model = model or conv_model()
    settings = {"layers": layers, "p": 1.0, **settings}
    links, batches = chain(spec, mixstyle=settings), Pictures(domains, rows)
    return Run(links, model, batches, steps=STEPS, optimizer=sgd)


def before_and_after(run, batch=None):
    """What the first block gives, and what the second takes."""
    batch, found = batch or run.batches(run.t), []
    first, second = run.model.featurizer[0], run.model.featurizer[1]
    hooks = [
        first.register_forward_hook(lambda m, i, o: found.append(o), prepend=True),
        second.register_forward_pre_hook(lambda m, i: found.append(i[0])),
    ]
    run.forward(batch.x)
    for hook in hooks:
        hook.remove()
    return [t.detach().double() for t in found]


def plain_styles(x):
    """Mean and deviation of each map, one after another; (N, C) each."""
    mean = [[m.sum() / m.numel() for m in maps] for maps in x]
    deviation = [
        [((m - m.sum() / m.numel()).square().sum() / (m.numel() - 1) + 1e-6).sqrt() for m in maps]
        for maps in x
    ]
    return [torch.stack([torch.stack(row) for row in s]) for s in (mean, deviation)]


def plain_restyled(x, partner, share):
    """The paper's formula, one map after another; no gradient through the statistics."""
    mean, deviation = (s.detach() for s in plain_styles(x))
    rows = []
    for i, maps in enumerate(x):
        j, own = partner[i], share[i]
        new = []
        for c, m in enumerate(maps):
            to_mean = own * mean[i, c] + (1 - own) * mean[j, c]
            to_deviation = own * deviation[i, c] + (1 - own) * deviation[j, c]
            new.append((m - mean[i, c]) / deviation[i, c] * to_deviation + to_mean)
        rows.append(torch.stack(new))
    return torch.stack(rows)


def pairs(before, after):
    """Of each row (j, λ), solved from the means of all maps and checked on all numbers."""
    mean, moved = before.mean(dim=(2, 3)), after.mean(dim=(2, 3))
    deviation = (before.var(dim=(2, 3)) + 1e-6).sqrt()
    found = []
    for i in range(len(before)):
        for j in sorted(range(len(before)), key=lambda j: j != i):  # itself first: it fits all
            way = mean[i] - mean[j]
            share = float((moved[i] - mean[j]) @ way / (way @ way)) if i != j else 1.0
            to_mean, to_deviation = (
                (share * s[i] + (1 - share) * s[j])[:, None, None] for s in (mean, deviation)
            )
            guess = before[i] - mean[i, :, None, None]
            guess = guess / deviation[i, :, None, None] * to_deviation + to_mean
            if torch.allclose(after[i], guess, atol=1e-4, rtol=1e-4):
                found.append((j, share))
                break
    assert len(found) == len(before)
    return found


def test_values_and_gradient_are_those_of_a_loop_over_maps():
    random = torch.Generator().manual_seed(0)
    for shape in ((5, 3, 4, 2), (4, 2, 1, 7), (3, 1, 2, 2, 3)):
        x = torch.randn(shape, generator=random, dtype=torch.float64).requires_grad_()
        partner = torch.randperm(len(x), generator=random)
        share = torch.rand(len(x), generator=random, dtype=torch.float64)
        found, expected = restyled(x, partner, share), plain_restyled(x, partner, share)
        torch.testing.assert_close(found, expected)
        way = torch.randn(shape, generator=random, dtype=torch.float64)
        slopes = [torch.autograd.grad((z * way).sum(), x)[0] for z in (found, expected)]
        torch.testing.assert_close(*slopes)


def test_statistics_of_half_precision_are_taken_in_float32():
    x = torch.randn(6, 2, 16, 16) * 0.5 + 100
    x = torch.cat([x, (x - 100) * 800]).half()  # variances beyond float16
    partner, share = torch.arange(12).flip(0), torch.full((12,), 0.25)
    found = restyled(x, partner, share)
    assert found.dtype == torch.float16
    expected = restyled(x.double(), partner, share)
    torch.testing.assert_close(found.double(), expected, rtol=4e-3, atol=0.5)


def test_a_flat_map_gives_no_noise():
    x = torch.full((2, 1, 8, 8), 1000.3)
    x[1] = torch.randn(1, 8, 8) * 50
    found = restyled(x, torch.tensor([1, 0]), torch.tensor([0.5, 0.5]))
    assert found[0].std() < 1e-4 * x[1].std()


def test_random_partners_are_an_order_of_all_rows_and_every_row_has_its_own_share():
    run, orders = mixing(alpha=1.0), set()
    for t in range(5):
        run.t = t
        found = pairs(*before_and_after(run))
        assert sorted(j for j, _ in found) == list(range(12))
        shares = [s for i, (j, s) in enumerate(found) if i != j]
        assert len({round(s, 4) for s in shares}) == len(shares)
        assert all(-1e-3 < s < 1 + 1e-3 for s in shares)
        orders.add(tuple(j for j, _ in found))
    assert len(orders) == 5


def test_partners_across_domains_are_a_random_order_of_the_next_domain_in_one_cycle():
    run, cycles, orders = mixing(alpha=1.0, mix="crossdomain"), set(), set()
    for t in range(10):
        run.t = t
        partners = [j for j, _ in pairs(*before_and_after(run))]
        next_of = [partners[4 * d] // 4 for d in range(3)]
        for d in range(3):
            rows = partners[4 * d : 4 * d + 4]
            assert sorted(rows) == list(range(4 * next_of[d], 4 * next_of[d] + 4))
            orders.add(tuple(j % 4 for j in rows))
        assert sorted(next_of) == [0, 1, 2]
        assert all(next_of[d] != d for d in range(3))
        cycles.add(tuple(next_of))
    assert len(cycles) == 2
    assert len(orders) > 10


@pytest.mark.parametrize("alpha", [0.3, 3.0])
def test_shares_follow_the_beta_distribution(alpha):
    """Beta(a, a) has mean 1/2 and variance 1/(4(2a + 1))."""
    run, shares = mixing(alpha=alpha), []
    for t in range(25):
        run.t = t
        found = pairs(*before_and_after(run))
        shares += [s for i, (j, s) in enumerate(found) if i != j]
    # rows that are their own partner leave no trace, nor do shares of nearly 1
    assert np.mean(shares) == pytest.approx(0.5, abs=0.1)
    assert np.var(shares) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.3)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_a_block_mixes_in_a_share_p_of_the_steps(p):
    run, acted = mixing(p=p), []
    for t in range(150):
        run.t = t
        before, after = before_and_after(run)
        acted.append(not before.equal(after))
    assert np.mean(acted) == pytest.approx(p, abs=0.1 if 0 < p < 1 else 0)


def test_the_draw_is_the_same_within_a_step_another_in_the_next_and_no_global_one():
    run = mixing()
    x, before = run.batches(0), random_state()
    first, again = (before_and_after(run, x)[1] for _ in range(2))
    assert first.equal(again)
    for run.t, run.seed in ((1, 0), (0, 1)):
        assert not before_and_after(run, x)[1].equal(first)
    assert random_state()["torch"].equal(before["torch"])
    assert random_state()["numpy"] == before["numpy"]


def test_every_block_has_draws_of_its_own():
    run, found = mixing(p=0.5), []
    for name in MAPS:
        block = run.model.get_submodule(name)
        block.register_forward_hook(lambda m, i, o, name=name: found.append((name, o)))
        block.register_forward_hook(
            lambda m, i, o, name=name: found.append((name, o)), prepend=True
        )
    acted = {name: [] for name in MAPS}
    for t in range(40):
        run.t = t
        found.clear()
        run.forward(run.batches(t).x)
        for name in MAPS:
            raw, mixed = (o for k, o in found if k == name)
            acted[name].append(not raw.equal(mixed))
    assert acted[MAPS[0]] != acted[MAPS[1]]


def test_input_mixes_the_images_themselves():
    run, plain = mixing(["input"]), conv_model()
    batch = run.batches(0)
    random = run.random("mixstyle.input")
    random.random()
    partner, share = random.permutation(12), random.beta(0.1, 0.1, 12)
    expected = plain.featurizer(plain_restyled(batch.x.double(), partner, share).float())
    torch.testing.assert_close(run.forward(batch.x)[0], expected, rtol=1e-3, atol=1e-4)


def test_training_on_mixed_images():
    settings = {"layers": ["input"], "p": 0.7, "alpha": 0.5}
    run = run_of("mixstyle_basic", {"mixstyle": settings})

    def loss(model, batch, t):
        run.t = t
        random = run.random("mixstyle.input")
        if random.random() < 0.7:
            partner, share = random.permutation(24), random.beta(0.5, 0.5, 24)
            batch = replace(batch, x=plain_restyled(batch.x.double(), partner, share))
        return erm(model, batch, t)

    expected = plain_training(loss)
    run.t = 0
    fit(run)
    assert_weights(run.live, expected.state_dict())
    assert not run.live["classifier.weight"].allclose(
        trained("basic").live["classifier.weight"], atol=1e-3
    )


def test_a_model_in_evaluation_mode_never_mixes():
    run, plain = mixing(["input", *MAPS]), conv_model()
    run.model.eval()
    x = run.batches(0).x
    assert run.forward(x)[1].equal(plain.eval()(x))


def test_statistics_of_batch_norm_are_recalibrated_without_mixing():
    model, plain = conv_model(), conv_model()
    for each in (model, plain):
        each.featurizer.insert(3, nn.BatchNorm2d(3))
    run = mixing(["featurizer.1", "input"], model=model)
    batches = [run.batches(t).x for t in range(3)]
    for model in (run.model, plain):
        recalibrate_batchnorm(model, batches)
    for key, value in plain.state_dict().items():
        assert run.live[key].equal(value), key


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_never_mixes_and_holds_no_run(twin_of):
    run = mixing(["input", *MAPS])
    twin, x = twin_of(run.model), run.batches(0).x
    assert twin.training
    assert twin(x).equal(conv_model()(x))
    assert not run.model(x).equal(conv_model()(x))
    held = weakref.ref(run), weakref.ref(run.model)
    model = run.model
    del run
    gc.collect()
    assert held[0]() is None  # not by the live model either
    assert model(x).shape == (12, 3)
    del model
    gc.collect()
    assert held[1]() is None
    assert twin(x).shape == (12, 3)


def test_a_resnet_mixes_after_its_first_two_stages():
    run = mixing(None, model=build_model("resnet18", (2, 32, 32), 3))
    backbone, found = run.model.featurizer.backbone, {}
    for name in ("maxpool", "layer1", "layer2", "layer3"):
        block = backbone.get_submodule(name)
        block.register_forward_hook(
            lambda m, i, o, name=name: found.setdefault(name, []).append(o), prepend=True
        )
        block.register_forward_hook(lambda m, i, o, name=name: found.setdefault(name, []).append(o))
    torch.manual_seed(0)
    run.forward(torch.randn(12, 2, 32, 32))
    acted = [name for name, (raw, given) in found.items() if not raw.equal(given)]
    assert acted == ["layer1", "layer2"]


def test_a_model_without_such_stages_needs_names():
    with pytest.raises(UserError, match=r"Model has no layer1 and layer2 as a ResNet has; name"):
        mixing(None)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("layer1", "did you mean 'featurizer.backbone.layer1'?"),
        ("featurizer.backbone.layr1", "did you mean 'featurizer.backbone.layer1'?"),
        ("backbone.layer2.0", "did you mean 'featurizer.backbone.layer2.0'?"),
        ("laier3", "did you mean 'featurizer.backbone.layer3'?"),
        ("xyz", "Known: featurizer, featurizer.normalize, featurizer.backbone, classifier"),
    ],
)
def test_an_unknown_block_is_refused_and_near_ones_named(name, near):
    model = build_model("resnet18", (3, 32, 32), 3)
    with pytest.raises(UserError) as refused:
        mixing([name], model=model)
    message = str(refused.value)
    assert message.startswith(f"trainer.mixstyle.layers: the model has no block {name!r}; ")
    assert near in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["featurizer", "featurizer.3", "featurizer.4", "classifier"])
def test_a_block_without_maps_is_refused_at_the_first_batch(name):
    run = mixing([name], p=0.0)
    with pytest.raises(UserError, match=rf"layers: {name} is of shape \(12, 3.*\); styles are"):
        run.forward(run.batches(0).x)


class Pair(nn.Module):
    def forward(self, x):
        return x, x


def test_a_sequence_of_tokens_is_no_map():
    layers = [nn.Conv2d(2, 4, 3), nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten()]
    run = mixing(["featurizer.1"], model=Model(nn.Sequential(*layers), nn.Linear(4, 3)).train())
    with pytest.raises(UserError, match=r"featurizer\.1 is of shape \(12, 4, 12\); styles are"):
        run.forward(run.batches(0).x)


def test_a_block_that_gives_no_tensor_is_refused():
    model = conv_model()
    model.featurizer.insert(0, Pair())
    run = mixing(["featurizer.0"], model=model)
    with pytest.raises(UserError, match=r"featurizer\.0 is no tensor; styles are those of maps"):
        run.forward(run.batches(0).x)


def test_partners_across_domains_need_several_in_a_batch():
    @trainer("pieces", splits_domains=True)
    class Pieces(Trainer):
        """Trains on one domain at a time."""

    with pytest.raises(UserError, match=r"here is 1; or write trainer\.mixstyle\.mix=random"):
        mixing(mix="crossdomain", domains=1)
    with pytest.raises(UserError, match=r"'pieces' feeds it one at a time; or write .*mix=random"):
        mixing(mix="crossdomain", spec="mixstyle_pieces_basic")
    run = mixing(domains=1)
    assert len(pairs(*before_and_after(run))) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"p": 1.1}, r"p=1\.1: a number from 0 to 1"),
        ({"alpha": 0}, r"alpha=0\.0: a number above 0"),
        ({"mix": "domain"}, "mix=domain: choose one of random, crossdomain"),
        ({"layers": []}, r"layers=\[\]: names of blocks, each once"),
        ({"layers": ["a", "a"]}, r"layers=.*: names of blocks, each once"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=rf"trainer\.mixstyle\.{message}"):
        chain("mixstyle_basic", mixstyle=settings)


@pytest.mark.parametrize("mix", ["random", "crossdomain"])
def test_the_contract_holds_for_mixstyle(mix):
    check_link("mixstyle", layers=["input"], p=1.0, mix=mix)


def test_half_precision_trains():
    run = mixing(["input", *MAPS])
    run.precision = "bf16"
    fit(run)
    assert all(v.isfinite().all() for v in run.live.values() if v.is_floating_point())
