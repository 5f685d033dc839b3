"""Gradients of two processes, sent while the backward pass goes on.

The processes run this file; each writes what it had, what it got, and when it sent what.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import join, started
from torch import nn

from dgavg import buckets
from dgavg.buckets import mean_gradients, split
from dgavg.update import Update

FIRST, SECOND, OTHER, LAST = 54, 24, 64, 32  # numbers in each layer's weight: a bucket


class Net(nn.Module):
    """Three layers, and before the last of them another that is used where it is asked for."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first = nn.Conv2d(2, 3, 3, bias=False).to(memory_format=torch.channels_last)
            self.second = nn.Linear(3, 8, bias=False)
            self.other = nn.Linear(8, 8, bias=False)
            self.last = nn.Linear(8, 4, bias=False)

    def outputs(self, rank, *, use_other=False, slopeless=False, back=lambda: None):
        """Outputs for rows of this process; `back` is called when a pass is at the first layer."""
        x = self.first(torch.rand(5, 2, 6, 6, generator=torch.Generator().manual_seed(rank)))
        x.register_hook(lambda slope: back())
        x = self.second(x.amax(dim=(2, 3))).tanh()
        if slopeless:
            x = Slopeless.apply(x, self.other.weight)
        return self.last(self.other(x) if use_other else x)


class Slopeless(torch.autograd.Function):
    """A function of a weight that gives it no gradient."""

    @staticmethod
    def forward(ctx, x, weight):
        return x + weight.mean()

    @staticmethod
    def backward(ctx, slope):
        return slope, None


class Breaks(torch.autograd.Function):
    """The identity; its slope is a mistake."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, slope):
        raise ArithmeticError("no slope")


def means(rank, **options):
    """This process's gradients, those of all, the layout of both, and the log of messages."""
    net, log = Net(), []
    weights = list(net.parameters())
    loss = net.outputs(rank, back=lambda: log.append("first layer"), **options).square().sum()
    own = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
    log.clear()
    plain = dist.all_reduce
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", lambda t, **k: log.append(t.numel()) or plain(t, **k))
        found = mean_gradients(loss, weights, retain=True)
        with pytest.raises(ArithmeticError):
            mean_gradients(Breaks.apply(loss), weights, retain=True)
        torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
    sent = list(log)
    again = mean_gradients(loss, weights)
    with pytest.raises(RuntimeError, match="second time"):
        mean_gradients(loss, weights)
    return {
        "own": own,
        "found": found,
        "again": again,
        "strides": [[None if t is None else t.stride() for t in ts] for ts in (weights, found)],
        "log": sent,
    }


def added(rank, scaled):
    """What `.grad` holds after one backward pass and after another, and what the first left."""
    net = Net()
    weights = list(net.parameters())
    update = Update(weights, torch.optim.SGD(weights, lr=1.0), scaled=scaled)
    update.backward(net.outputs(rank).square().sum())
    held = [w.grad for w in weights]
    first = [None if g is None else g.clone() for g in held]
    update.backward(net.outputs(rank).exp().sum())
    both = [w.grad for w in weights]
    same = all(a is b for a, b in zip(held, both, strict=True))
    for w in weights:
        w.grad = None
    update.backward(net.outputs(rank).exp().sum())
    second = [w.grad for w in weights]
    return {"first": first, "both": both, "second": second, "in place": same}


def main(rank, folder):
    join(rank, folder)
    assert 4 * min(FIRST, SECOND, OTHER, LAST) > buckets.SIZE
    found = {"all": means(rank, use_other=True), "some": means(rank)}
    found["slopeless"] = means(rank, slopeless=True)
    found |= {"added": added(rank, False), "scaled": added(rank, True)}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return started(__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", ["all", "some", "slopeless"])
def test_gradients_are_means_and_the_same_in_both(ranks, case):
    one, other = (rank[case] for rank in ranks)
    for a, b, own, others in zip(
        one["found"], other["found"], one["own"], other["own"], strict=True
    ):
        assert (a is None) == (b is None) == (own is None)
        if own is not None:
            assert a.equal(b)
            torch.testing.assert_close(a, (own + others) / 2)
            assert not own.allclose(others)
    assert [g is None for g in one["found"]] == [False, False, case != "all", False]


def test_they_are_laid_out_as_their_parameters(ranks):
    weights, gradients = ranks[0]["all"]["strides"]
    assert weights == gradients
    assert weights[0] == (18, 1, 6, 2)  # channels last


def test_messages_leave_during_the_pass(ranks):
    for rank in ranks:
        assert rank["all"]["log"][:5] == [LAST, OTHER, SECOND, "first layer", FIRST]


def test_a_gradient_that_is_missing_holds_up_all_after_it(ranks):
    for rank in ranks:
        assert rank["some"]["log"][:4] == [LAST, "first layer", SECOND, FIRST]


def test_after_a_pass_and_one_that_failed_nothing_more_is_sent(ranks):
    for rank in ranks:
        assert rank["all"]["log"][5:] == rank["some"]["log"][4:] == ["first layer"]


def test_the_graph_is_kept_where_asked_for(ranks):
    for found, again in zip(ranks[0]["all"]["found"], ranks[0]["all"]["again"], strict=True):
        assert found.equal(again)


@pytest.mark.parametrize("case", ["added", "scaled"])
def test_passes_add_up_in_place(ranks, case):
    for rank in ranks:
        assert rank[case]["in place"]
        kinds = (rank[case][k] for k in ("first", "second", "both"))
        for first, second, both in zip(*kinds, strict=True):
            assert (first is None) == (second is None) == (both is None)
            assert first is None or (first + second).equal(both)


def test_a_scaled_loss_gives_gradients_in_plain_units(ranks):
    for plain, scaled in zip(ranks[0]["added"]["both"], ranks[0]["scaled"]["both"], strict=True):
        assert plain is scaled is None or plain.equal(scaled)  # the scale is a power of two


def test_a_bucket_ends_with_the_parameter_that_fills_it_and_with_its_kind(monkeypatch):
    monkeypatch.setattr(buckets, "SIZE", 32)
    parameters = [nn.Parameter(torch.zeros(n)) for n in (4, 1, 9, 2, 6, 3)]
    parameters[2] = nn.Parameter(torch.zeros(9, dtype=torch.float64))
    found = [[p.numel() for p in part] for part in split(parameters)]
    assert found == [[3, 6], [2], [9], [1, 4]]


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
