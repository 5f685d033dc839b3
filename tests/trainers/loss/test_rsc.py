"""RSC against DomainBed's, with NumPy's percentiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from plain import (
    assert_weights,
    domains_of,
    forward,
    mean,
    plain_training,
    run_of,
    trained,
)
from torch import nn

from dgavg import Trainer, UserError, chain, trainer
from dgavg.models import Model
from dgavg.testing import check_link, toy_model
from dgavg.trainers.loss.rsc import kept_features, quantile


def plain_mask(head, features, y, f_drop, b_drop):
    """`RSC.update` of DomainBed up to its mask, row by row; percentiles in the features' type."""
    logits = head(features)
    labels = y if y.is_floating_point() else F.one_hot(y, logits.shape[1]).to(logits.dtype)
    features = features.detach().requires_grad_()
    logits = head(features)
    slopes = torch.autograd.grad((logits * labels).sum(), features)[0].numpy()
    mask = np.zeros(slopes.shape, slopes.dtype)
    for i, row in enumerate(slopes):
        mask[i] = row < np.percentile(row, (1 - f_drop) * 100).astype(row.dtype)
    with torch.no_grad():
        muted = head(features * torch.from_numpy(mask))
        before, after = ((z.softmax(1) * labels).sum(1).numpy() for z in (logits, muted))
    change = before - after
    calm = change < np.percentile(change, (1 - b_drop) * 100).astype(change.dtype)
    return np.logical_or(mask, calm[:, None])


def plain_risks(head, features, batch, f_drop, b_drop):
    mask = torch.from_numpy(plain_mask(head, features, batch.y, f_drop, b_drop)).double()
    logits = head(features * mask)
    return [F.cross_entropy(logits[rows], batch.y[rows]) for rows in domains_of(batch)]


def heads(width):
    torch.manual_seed(width)
    yield nn.Linear(width, 4)
    yield nn.Sequential(nn.Linear(width, 7), nn.Tanh(), nn.Linear(7, 4))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("width", [4, 7, 10])  # 4, 7 and 10 features have a value at 2/3
@pytest.mark.parametrize(("f_drop", "b_drop"), [(1 / 3, 1 / 3), (0.5, 0.2), (0.1, 1.0)])
def test_what_is_kept_is_what_domainbed_keeps(width, f_drop, b_drop, soft):
    for head in heads(width):
        features, y = torch.randn(13, width), torch.randint(4, (13,))
        y = torch.rand(13, 4).softmax(dim=1) if soft else y
        found = kept_features(head, features, y, f_drop, b_drop).numpy()
        expected = plain_mask(head, features, y, f_drop, b_drop)
        assert (found == expected).all()
        assert not expected.all()


def test_ties_at_the_quantile_are_all_muted():
    head = nn.Linear(6, 2).double()
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 2, 2, 2, 3, 0]] * 2))
    y = torch.tensor([0, 1, 0])
    # with the same slope in both classes every probability stays: all three rows tie as well
    kept = kept_features(head, torch.ones(3, 6, dtype=torch.float64), y, 1 / 3, 1 / 3)
    assert kept.tolist() == [[True, False, False, False, False, True]] * 3


@pytest.mark.parametrize("n", [1, 2, 4, 9, 64, 100])
def test_quantiles_are_numpys(n):
    values = np.random.default_rng(n).standard_normal((5, n))
    for share in (0, 0.1, 1 / 3, 0.5, 2 / 3, 1 - 1 / 3, 0.9, 1):
        found = quantile(torch.from_numpy(values), share).squeeze(-1).numpy()
        np.testing.assert_allclose(found, np.percentile(values, 100 * share, axis=1), rtol=1e-12)


def test_a_quantile_that_is_a_value_is_it_to_the_bit():
    squares = torch.arange(10.0, dtype=torch.float64).square()
    assert quantile(squares, 1 - 1 / 3).item() == 36.0  # 9 · (1 − 1/3) is above 6 by rounding


@pytest.mark.parametrize("soft", [False, True])
def test_the_loss_and_its_gradients_are_domainbeds(soft):
    run = run_of("rsc_basic", model=toy_model().double())
    batch = run.batches(0)
    batch.x = batch.x.double()
    if soft:
        batch.y = F.one_hot(batch.y, 3).double() * 0.7 + 0.1
    run.forward = lambda x: forward(run.model, batch)  # Run.forward gives float32
    out = run.loss(batch)
    features, _ = forward(run.model, batch)
    expected = torch.stack(plain_risks(run.model.classifier, features, batch, 1 / 3, 1 / 3))
    torch.testing.assert_close(out.risks.double(), expected, rtol=1e-6, atol=1e-6)
    for name, p in run.model.named_parameters():
        mine, theirs = (
            torch.autograd.grad(risks.mean(), p, retain_graph=True)[0]
            for risks in (out.risks, expected)
        )
        torch.testing.assert_close(
            mine, theirs, rtol=1e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_training_is_that_on_muted_features():
    def loss(model, batch, t):
        features, _ = forward(model, batch)
        return mean(plain_risks(model.classifier, features, batch, 0.4, 0.6))

    run = trained("rsc_basic", {"rsc": {"f_drop": 0.4, "b_drop": 0.6}})
    assert_weights(run.live, plain_training(loss).state_dict())


@pytest.mark.parametrize("off", ["f_drop", "b_drop"])
def test_a_share_of_0_is_basic_to_the_bit(off):
    found, basic = trained("rsc_basic", {"rsc": {off: 0}}).live, trained("basic").live
    assert all(v.equal(basic[k]) for k, v in found.items())


def test_links_outside_see_the_muted_pass_and_the_weights_stay():
    seen = []

    @trainer("watch")
    class Watch(Trainer):
        """Notes the loss that it gets."""

        def loss(self, run, batch):
            seen.append(self.inner.loss(run, batch))
            return seen[-1]

    for spec in ("watch_rsc_basic", "rsc_watch_basic"):
        run = run_of(spec)
        batch = run.batches(0)
        batch.weights = torch.tensor([0.0, 1.0, 0.0])
        total = run.loss(batch).total
    muted, whole = seen
    assert (muted.features == 0).any(dim=1).float().mean() == pytest.approx(1 / 3, abs=0.05)
    torch.testing.assert_close(muted.logits, run.model.classifier(muted.features))
    assert not (whole.features == 0).any()
    assert muted.weights.equal(batch.weights)
    torch.testing.assert_close(total, muted.risks[1])


def test_the_inner_slopes_leave_gradients_alone():
    run = run_of("rsc_basic")
    run.loss(run.batches(0))
    assert all(p.grad is None for p in run.parameters)


def with_norm_in_the_head():
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    return Model(nn.Flatten(), head).train()


def test_running_statistics_in_the_classifier_are_those_of_the_first_pass():
    run, basic = (run_of(s, model=with_norm_in_the_head()) for s in ("rsc_basic", "basic"))
    for each in (run, basic):
        each.loss(each.batches(0))
    for name in run.buffer_names:
        assert run.live[name].equal(basic.live[name]), name


def test_it_runs_in_bfloat16():
    run = trained("rsc_basic", precision="bf16")
    logits = run.loss(run.batches(0)).logits
    assert logits.bfloat16().float().equal(logits)  # so is the muted pass
    assert all(v.isfinite().all() for v in run.live.values() if v.is_floating_point())


@pytest.mark.parametrize(
    ("key", "value"), [("f_drop", -0.1), ("f_drop", 1.0), ("b_drop", -0.1), ("b_drop", 1.1)]
)
def test_shares_out_of_range_are_refused(key, value):
    with pytest.raises(UserError, match=rf"trainer\.rsc\.{key}={value}: a number from 0 to"):
        chain("rsc_basic", rsc={key: value})


def test_the_contract_holds_for_rsc():
    check_link("rsc")
