"""ARM against a loop over domains with the context by hand, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from plain import STEPS, assert_weights, mean, run_of, sgd
from torch import nn

from dgavg import UserError, chain, fit
from dgavg.evaluation import Scorer, Split
from dgavg.models import Model, build_model
from dgavg.seeding import random_state
from dgavg.testing import ToyBatches, check_link, toy_model
from dgavg.testing.contract import same
from dgavg.trainer import Candidate


def conv_model():
    """Two convolutions and batch norm for the toy's images (1, 2, 2)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 4, 2, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten()]
        return Model(nn.Sequential(*layers), nn.Linear(36, 3)).train()


def by_hand(model, batch):
    """The mean of the domains' risks: context per domain, then the widened network."""
    net, x = model.featurizer, batch.x.double()
    x = x.flatten(1) if net.flat else x
    context = net.context(x)
    read = []
    for d in range(3):
        rows = [i for i in range(len(batch.d)) if batch.d[i] == d]
        shared = mean([context[i] for i in rows])
        read += [torch.cat([x[i], shared]) for i in rows]
    logits = model.classifier(net.network(torch.stack(read)))
    rows = len(batch.d) // 3
    parts = zip(logits.split(rows), batch.y.split(rows), strict=True)
    return mean([F.cross_entropy(a, y) for a, y in parts])


@pytest.mark.parametrize("make", [toy_model, conv_model])
def test_training_puts_the_domains_mean_context_beside_each_image(make):
    run = run_of("arm_basic", model=make())
    model = copy.deepcopy(run.model).double()
    optimizer, batches = sgd(model.parameters()), ToyBatches()
    for t in range(STEPS):
        optimizer.zero_grad()
        by_hand(model, batches(t)).backward()
        optimizer.step()
    fit(run)
    assert_weights(run.live, model.state_dict(), rtol=1e-3, atol=2e-4)
    first = next(m for m in run.model.featurizer.network.modules() if hasattr(m, "weight"))
    assert first.weight[:, first.weight.shape[1] // 2 :].abs().max() > 1e-3


@pytest.mark.parametrize("make", [toy_model, conv_model])
def test_gradients_are_those_of_the_loop(make):
    run = run_of("arm_basic", model=make())
    run.model.double()
    for parameter in run.model.parameters():  # the new channel's weights off 0
        random = torch.Generator().manual_seed(parameter.numel())
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=random).double()
    model, batch = copy.deepcopy(run.model), run.batches(0)
    expected = by_hand(model, batch)
    logits = run.model(batch.x.double())
    mine = F.cross_entropy(logits, batch.y)
    torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12)
    slopes = torch.autograd.grad(mine, list(run.model.parameters()))
    others = torch.autograd.grad(expected, list(model.parameters()))
    for a, b in zip(slopes, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("make", [toy_model, conv_model])
def test_the_model_starts_as_it_was(make):
    batch = ToyBatches()(0)
    found, basic = (run_of(s, model=make()).loss(batch) for s in ("arm_basic", "basic"))
    torch.testing.assert_close(found.logits, basic.logits)


def test_a_batch_of_one_domain_has_one_context():
    run = run_of("arm_basic")
    whole, single = run.batches(0), run.batches(0).split()[1]
    parameter = run.model.featurizer.network[1].weight
    with torch.no_grad():
        parameter += 0.5
    run.loss(single)
    assert run.model.featurizer.domains == 1
    run.loss(whole)
    assert run.model.featurizer.domains == 3
    net = run.model.featurizer
    net.domains = 1
    x = single.x.flatten(1)
    shared = net.context(x).mean(dim=0).expand_as(x)
    torch.testing.assert_close(net(single.x), net.network(torch.cat([x, shared], dim=1)))


def test_at_evaluation_the_batch_at_hand_is_the_context():
    torch.manual_seed(0)
    run = run_of("arm_basic")
    fit(run)
    model, x = run.model.eval(), run.batches(50).x
    flat, net = x.flatten(1), model.featurizer
    shared = mean(list(net.context(flat)))
    expected = torch.stack([net.network(torch.cat([row, shared])[None])[0] for row in flat])
    torch.testing.assert_close(net(x), expected)
    assert not torch.allclose(net(x[:8]), expected[:8])


@pytest.mark.parametrize(
    ("kind", "options", "shape", "first"),
    [
        ("resnet18", {}, (3, 32, 32), "backbone.network.conv1"),
        ("cnn", {}, (1, 28, 28), "network.0"),
        ("mlp", {"width": 8}, (3, 4, 4), "network.1"),
        ("timm", {"backbone": "tf_efficientnet_lite0"}, (3, 32, 32), "backbone.network.conv_stem"),
        ("timm", {"backbone": "test_vit"}, (3, 160, 160), "backbone.network.patch_embed.proj"),
    ],
)
def test_known_models_keep_their_weights_and_what_they_give(kind, options, shape, first):
    torch.manual_seed(0)
    model = build_model(kind, shape, 3, **options).eval()
    x = torch.rand(4, *shape)
    before, logits = copy.deepcopy(model.state_dict()), model(x)
    chain("arm_basic").adapt(model, 3)
    torch.testing.assert_close(model.eval()(x), logits)
    layer = model.featurizer.get_submodule(first)
    name = "featurizer." + first.replace("network.", "", 1) + ".weight"
    old = before[name]
    assert layer.weight[:, : old.shape[1]].equal(old)
    assert layer.weight[:, old.shape[1] :].abs().max() == 0
    kept = {k.replace("network.", "", 1): v for k, v in model.state_dict().items()}
    changed = [k for k, v in before.items() if not (v.shape == kept[k].shape and v.equal(kept[k]))]
    assert changed == [name]
    inputs = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    assert inputs == layer.weight.shape[1]
    assert model.support == 32


def test_the_context_network_is_domainbeds():
    model = build_model("resnet18", (3, 32, 32), 3)
    chain("arm_basic").adapt(model, 3)
    context = model.featurizer.backbone.context
    kinds = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * 2 + [nn.Conv2d]
    assert [type(m) for m in context] == kinds
    shapes = [tuple(p.shape) for p in context.parameters() if p.dim() == 4]
    assert shapes == [(64, 3, 5, 5), (64, 64, 5, 5), (1, 64, 5, 5)]
    assert context(torch.rand(2, 3, 9, 7)).shape == (2, 1, 9, 7)


def test_the_context_network_follows_the_seed_and_leaves_the_generator_alone():
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        before = random_state()["torch"]
        model = toy_model()
        chain("arm_basic").adapt(model, 3)
        assert random_state()["torch"].equal(before)
        found.append(dict(model.state_dict()))
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


def test_splits_are_scored_apart_in_batches_of_one_context():
    torch.manual_seed(0)
    model = toy_model()
    chain("arm_basic", arm={"support": 5}).adapt(model, 3)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.4 * torch.randn(parameter.shape, generator=random)
    splits = {
        name: Split(
            torch.randint(0, 255, (n, 1, 2, 2), generator=random, dtype=torch.uint8),
            torch.randint(3, (n,), generator=random),
        )
        for name, n in (("a/out", 12), ("b/out", 7), ("c/in", 3))
    }
    scorer = Scorer(model, splits, list, batch_size=512, held_out=frozenset({"c/in"}))
    scores = scorer.score({"live": Candidate(model.state_dict())})["live"]
    model.eval()
    for name, split in splits.items():
        losses = []
        for start in range(0, len(split.labels), 5):
            rows = slice(start, start + 5)
            logits = model(split.images[rows].float() / 255)
            losses.append(F.cross_entropy(logits, split.labels[rows], reduction="sum"))
        expected = sum(losses).item() / len(split.labels)
        assert scores[name].loss == pytest.approx(expected, rel=1e-5)
        assert scores[name].n == len(split.labels)
    whole = F.cross_entropy(model(splits["a/out"].images.float() / 255), splits["a/out"].labels)
    assert scores["a/out"].loss != pytest.approx(whole.item(), rel=1e-4)


def test_models_that_no_channel_can_be_added_to_are_refused():
    grouped = Model(nn.Sequential(nn.Conv2d(4, 4, 1, groups=4), nn.Flatten()), nn.Linear(16, 3))
    for model in (Model(nn.Flatten(), nn.Linear(4, 3)), grouped):
        with pytest.raises(UserError, match="begins with a convolution or linear layer"):
            run_of("arm_basic", model=model)
    pooled = Model(nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(1, 8)), nn.Linear(8, 3))
    with pytest.raises(UserError, match="with one more channel the model can't read the images"):
        run_of("arm_basic", model=pooled)


def test_a_support_below_1_is_refused():
    with pytest.raises(UserError, match=r"trainer\.arm\.support=0: at least 1 row"):
        chain("arm_basic", arm={"support": 0})


def test_the_contract():
    check_link("arm")
