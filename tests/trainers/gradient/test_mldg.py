"""MLDG against DomainBed's loop over pairs on deep copies, with a fresh Adam each."""

from __future__ import annotations

import copy
from itertools import cycle

import pytest
import torch
import torch.nn.functional as F
from plain import assert_weights, domains_of, plain_training, run_of, sgd, trained

from dgavg import UserError, chain
from dgavg.testing import toy_model


def risk(model, batch, rows):
    return F.cross_entropy(model(batch.x[rows].double()), batch.y[rows])


def mldg_gradient(n_meta_test, beta, lr_at=lambda t: 0.1):
    def gradient(model, batch, t):
        run = run_of("basic")
        run.t = t
        rows = domains_of(batch)
        order = run.random("mldg").permutation(len(rows)).tolist()
        pairs = zip(order[:-n_meta_test], cycle(order[-n_meta_test:]))
        total = [torch.zeros_like(p) for p in model.parameters()]
        for i, j in pairs:
            twin = copy.deepcopy(model)
            inner = torch.optim.Adam(twin.parameters(), lr=lr_at(t))
            risk(twin, batch, rows[i]).backward()
            inner.step()
            first = [p.grad for p in twin.parameters()]
            second = torch.autograd.grad(risk(twin, batch, rows[j]), list(twin.parameters()))
            for sum_, g_i, g_j in zip(total, first, second, strict=True):
                sum_ += (g_i + beta * g_j) / len(rows)
            with torch.no_grad():
                risk(model, batch, rows[i])  # moves the running statistics, as a pass at w does
        for p, value in zip(model.parameters(), total, strict=True):
            p.grad = value

    return gradient


@pytest.mark.parametrize(("n_meta_test", "beta"), [(2, 1.0), (1, 1.0), (1, 0.3), (2, 0.0)])
def test_training_steps_with_the_gradients_of_pairs(n_meta_test, beta):
    run = trained("mldg_basic", {"mldg": {"n_meta_test": n_meta_test, "beta": beta}})
    model = plain_training(gradient=mldg_gradient(n_meta_test, beta))
    assert_weights(run.live, model.state_dict(), rtol=1e-3, atol=1e-4)


def test_the_inner_step_follows_the_learning_rate():
    schedule = [0.1, 1.0, 3.0]
    run = run_of("mldg_basic", {"mldg": {"n_meta_test": 1}}, schedule=lambda t: schedule[t % 3])
    for run.t in range(3):
        model = toy_model().double()
        model.load_state_dict({k: v.double() for k, v in run.live.items()})
        mldg_gradient(1, 1.0, lambda t: 0.1 * schedule[t])(model, run.batches(run.t), run.t)
        run.grad(run.batches(run.t))
        for mine, theirs in zip(run.parameters, model.parameters(), strict=True):
            torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-3, atol=1e-5)


def test_groups_with_a_learning_rate_of_their_own_move_by_it():
    def groups(parameters):
        parameters = list(parameters)
        return torch.optim.SGD(
            [{"params": parameters[:-2]}, {"params": parameters[-2:], "lr": 0.0}], lr=0.1
        )

    run, moves = run_of("mldg_basic", optimizer=groups), []
    start = [p.detach().clone() for p in run.parameters]

    def note(module, inputs):
        moves.append(
            [(p - s).abs().max().item() for p, s in zip(run.parameters, start, strict=True)]
        )

    run.model.classifier.register_forward_pre_hook(note)
    run.grad(run.batches(0))
    assert moves[0] == [0.0] * len(start)
    assert moves[1][-2:] == [0.0, 0.0]
    assert moves[1][0] == pytest.approx(0.1, rel=1e-3)


def test_weights_are_put_back_to_the_bit_and_statistics_are_those_of_meta_training():
    run = run_of("mldg_basic", {"mldg": {"n_meta_test": 2}})
    before = {k: v.clone() for k, v in run.model.named_parameters()}
    run.grad(run.batches(0))
    assert all(v.equal(before[k]) for k, v in run.model.named_parameters())
    assert run.live["featurizer.2.num_batches_tracked"].item() == 1


def test_an_exception_at_the_moved_weights_puts_them_back():
    run, passes = run_of("mldg_basic"), []
    before = {k: v.clone() for k, v in run.model.named_parameters()}

    def fuse(module, inputs):
        passes.append(1)
        if len(passes) == 2:
            raise RuntimeError("second pass")

    run.model.classifier.register_forward_pre_hook(fuse)
    with pytest.raises(RuntimeError, match="second pass"):
        run.grad(run.batches(0))
    assert all(v.equal(before[k]) for k, v in run.model.named_parameters())
    assert run.model.featurizer[2].track_running_stats


def test_the_loss_it_reports_is_the_mean_of_meta_training_at_the_weights():
    run = run_of("mldg_irm_basic", {"mldg": {"n_meta_test": 1}, "irm": {"anneal": 0}})
    batch = run.batches(0)
    train = run.random("mldg").permutation(3).tolist()[:2]
    found = run.grad(batch)
    plain = run_of("irm_basic", {"irm": {"anneal": 0}})
    losses = [plain.loss(part) for part in (batch.split()[i] for i in train)]
    pairs = [(k.risks[0], k.terms["irm"]) for k in losses]
    risk_of, term = (sum(v) / 2 for v in zip(*pairs, strict=True))
    assert found.risks.shape == (1,)
    torch.testing.assert_close(found.risks[0], risk_of)
    torch.testing.assert_close(found.terms["irm"], term)
    torch.testing.assert_close(found.total, risk_of + term)
    assert not found.total.requires_grad


def test_a_penalty_counts_in_both_passes():
    found = []
    for weight in (0.0, 1e3):
        run = run_of("mldg_irm_basic", {"irm": {"weight": weight, "anneal": 0}})
        run.grad(run.batches(0))
        found.append(torch.cat([p.grad.flatten() for p in run.parameters]))
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_a_batch_of_one_domain_is_handed_on():
    run, basic = run_of("mldg_basic"), run_of("basic")
    for each in (run, basic):
        each.grad(each.batches(0).split()[1])
    assert all(a.grad.equal(b.grad) for a, b in zip(run.parameters, basic.parameters, strict=True))


def test_an_overflow_at_the_moved_weights_leaves_the_loss_finite():
    run = run_of("mldg_basic", precision="fp16", optimizer=sgd)
    run.update.scale = 2.0**40
    before = {k: v.clone() for k, v in run.model.named_parameters()}
    assert run.step(run.batches(0)).total.isfinite()
    assert all(v.equal(before[k]) for k, v in run.model.named_parameters())


def test_a_split_without_meta_train_domains_is_refused():
    with pytest.raises(UserError, match=r"n_meta_test=2 leaves no domain to train on: fewer than"):
        run_of("mldg_basic", domains=2)


@pytest.mark.parametrize(("name", "value"), [("n_meta_test", 0), ("beta", -1.0)])
def test_settings_of_mldg_out_of_range_are_refused(name, value):
    with pytest.raises(UserError, match=rf"trainer.mldg.{name}={value}: a number from"):
        chain("mldg_basic", mldg={name: value})


@pytest.mark.parametrize("other", ["coral", "andmask", "fish"])
def test_links_that_compare_domains_are_refused_beside_it(other):
    with pytest.raises(UserError, match="feeds it one at a time"):
        chain(f"mldg_{other}_basic")
    with pytest.raises(UserError, match="feeds it one at a time"):
        chain(f"{other}_mldg_basic")
