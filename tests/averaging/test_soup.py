"""Uniform and greedy soups: what is averaged, in what, how much memory, and who gets in."""

from __future__ import annotations

import itertools
import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from live_bytes import LiveBytes
from torch import nn

from dgavg.averaging.soup import greedy_soup, uniform_soup

SIZE = 10_000
KINDS = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "complex64": torch.complex64,
}


class Tied(nn.Module):
    """Two layers of one weight, batch norm, and a buffer of each other kind."""

    def __init__(self, seed, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(3)
        self.norm.running_mean.normal_()
        self.to(dtype)
        self.phase = nn.Parameter(torch.randn(2, dtype=torch.complex64))
        self.register_buffer("seen", torch.tensor(seed))
        self.register_buffer("flags", torch.tensor([seed % 2 == 0, True]))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))


def plain_mean(states):
    """In float64; integers and booleans of the last."""
    found = {}
    for name, last in states[-1].items():
        stack = torch.stack([s[name] for s in states])
        wide = torch.complex128 if last.is_complex() else torch.float64
        numeric = last.is_floating_point() or last.is_complex()
        found[name] = stack.to(wide).mean(dim=0).to(last.dtype) if numeric else last
    return found


def assert_equal(found, expected, **tolerance):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        torch.testing.assert_close(found[name], tensor, **tolerance, msg=lambda m, n=name: n + m)


def snapshot(tensors):
    return {k: v.clone() for k, v in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", ["modules", "mappings", "functions"])
def test_a_uniform_soup_is_the_mean_in_the_models_dtypes(given, dtype):
    models = [Tied(seed, dtype) for seed in range(5)]
    states = [m.state_dict() for m in models]
    before = [snapshot(s) for s in states]
    sources = {
        "modules": models,
        "mappings": states,
        "functions": [lambda s=s: s for s in states],
    }[given]
    soup = uniform_soup(sources)
    assert_equal(soup, plain_mean(states))
    for state, old in zip(states, before, strict=True):
        assert_equal(state, old, rtol=0, atol=0)  # untouched
    memory = {t.data_ptr() for s in states for t in s.values()}
    assert not memory & {t.data_ptr() for t in soup.values()}
    assert soup["first.weight"].data_ptr() == soup["second.weight"].data_ptr()
    assert soup["seen"].item() == 4
    assert soup["flags"].tolist() == [True, True]
    assert soup["mask"].tolist() == [0.0, -math.inf]


def test_one_model_is_copied_to_the_bit():
    model = Tied(1)
    soup = uniform_soup([model])
    assert_equal(soup, model.state_dict(), rtol=0, atol=0)
    assert soup["seen"].data_ptr() != model.seen.data_ptr()
    assert soup["norm.bias"].data_ptr() != model.norm.bias.data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    """Summed in bfloat16, 256 and 1 are 256 again."""
    values = [256.0, *[1.0] * 127]
    soup = uniform_soup({"w": torch.tensor([v], dtype=dtype)} for v in values)
    assert soup["w"].item() == pytest.approx(sum(values) / 128, abs=2**-6)


def test_a_mean_of_many_does_not_drift():
    random = torch.Generator().manual_seed(0)
    models = [{"w": 1 + torch.randn(100, generator=random) / 100} for _ in range(1000)]
    exact = torch.stack([m["w"] for m in models]).double().mean(dim=0)
    error = (uniform_soup(models)["w"].double() - exact).abs().max().item()
    assert error < 5e-6  # 40 float32 steps at 1; in bfloat16 it would be 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_equal_models_are_their_mean_to_the_bit(kind):
    weight = torch.randn(1000, dtype=KINDS[kind])
    soup = uniform_soup({"w": weight.clone()} for _ in range(7))
    assert soup["w"].equal(weight)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.floats(-100, 100, width=32), min_size=3, max_size=3), min_size=1))
def test_the_order_of_models_makes_no_difference(rows):
    there = uniform_soup({"w": torch.tensor(row)} for row in rows)
    back = uniform_soup({"w": torch.tensor(row)} for row in reversed(rows))
    torch.testing.assert_close(there, back, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        there["w"].double(), torch.tensor(rows, dtype=torch.float64).mean(dim=0), rtol=1e-5,
        atol=1e-4, check_dtype=False,
    )  # fmt: skip


def test_prefixes_of_wrapped_models_are_no_difference():
    inner = nn.Linear(2, 2)
    compiled = {f"_orig_mod.{k}": v + 2 for k, v in inner.state_dict().items()}
    soup = uniform_soup([nn.DataParallel(inner), compiled])
    assert_equal(soup, {k: v + 1 for k, v in inner.state_dict().items()})


def test_models_in_two_precisions_come_back_in_that_of_the_first():
    wide = {"w": torch.tensor([1.0, 2.0])}
    narrow = {"w": torch.tensor([2.0, 5.0], dtype=torch.float64)}
    soup = uniform_soup([wide, narrow])
    assert soup["w"].dtype == torch.float32
    assert soup["w"].tolist() == [1.5, 3.5]


def test_a_tied_weight_that_a_file_holds_twice_is_fine_and_one_that_differs_is_refused():
    model = Tied(0)
    state = snapshot(Tied(1).state_dict())  # as safetensors gives it: no memory is shared
    soup = uniform_soup([model, state])
    assert_equal(soup, plain_mean([model.state_dict(), state]))
    state["second.weight"] += 1
    with pytest.raises(
        ValueError, match=r"models\[1\] and models\[0\] differ: first.weight and second.weight are"
    ):
        uniform_soup([model, state])
    assert_equal(uniform_soup([state, model]), plain_mean([state, model.state_dict()]))


REFUSED = {
    "no models": ([], "no models: a soup needs at least one"),
    "names": (
        [nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2, bias=False)],
        r"models\[2\] and models\[0\] differ: .*1 names missing \(bias\)",
    ),
    "shapes": (
        [nn.Linear(2, 2), nn.Linear(3, 2)],
        r"models\[1\] and models\[0\] differ: .*weight is \(2, 3\)",
    ),
    "kinds": (
        [{"w": torch.ones(1)}, {"w": torch.ones(1, dtype=torch.int64)}],
        r"models\[1\] and models\[0\] differ: w is torch.int64 in the one and torch.float32",
    ),
    "complex": (
        [{"w": torch.ones(1)}, {"w": torch.ones(1, dtype=torch.complex64)}],
        "w is torch.complex64 in the one",
    ),
    "a path": ([{"w": torch.ones(1)}, "runs/a"], r"models\[1\] is str: give a module, a mapping"),
    "a loader of nothing": ([lambda: None], r"models\[0\] is NoneType: give a module"),
    "an empty model": ([{}], r"models\[0\] has no tensors"),
    "twice": (
        [{"w": torch.ones(1), "_orig_mod.w": torch.ones(1)}],
        r"models\[0\]: two tensors have the same name",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_soup_is_refused_in_one_line(case):
    models, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as caught:
        uniform_soup(models)
    assert "\n" not in str(caught.value)


class Loaders:
    """Functions that load models of `tensors` × SIZE numbers; counts those alive at each load."""

    def __init__(self, count, dtype=torch.float32, tensors=10):
        self.dtype, self.tensors = dtype, tensors
        self.alive, self.loads, self.most = weakref.WeakSet(), [0] * count, 0
        self.size = tensors * SIZE * torch.empty(0, dtype=dtype).element_size()

    def __call__(self, i):
        self.loads[i] += 1
        assert len(self.alive) == 0, "the last one was still alive"
        found = {}
        for k in range(self.tensors):
            found[f"{k}"] = torch.full((SIZE,), float(i), dtype=self.dtype)
            self.alive.add(found[f"{k}"].untyped_storage())
        return found

    def all(self):
        return [lambda i=i: self(i) for i in range(len(self.loads))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_uniform_soup_holds_the_mean_and_one_model(dtype):
    loaders = Loaders(5, dtype)
    with LiveBytes() as memory:
        soup = uniform_soup(loaders.all())
    assert loaders.loads == [1] * 5
    assert soup["0"][0].item() == 2
    mean = 10 * SIZE * 4
    converted = 0 if dtype == torch.float32 else SIZE * 4
    assert memory.peak <= mean + loaders.size + converted + SIZE + 100  # and what is equal in both


# Greedy soups. A model is one number, and a score a function of the mean.


def greedy(values, score, **options):
    return greedy_soup([{"w": torch.tensor([v])} for v in values], score, **options)


def near(target):
    return lambda weights: -abs(weights["w"].item() - target)


def plain_greedy(values, target, ties):
    """By the definition, in float64: members and score."""
    order = sorted(range(len(values)), key=lambda i: abs(values[i] - target))
    members = [order[0]]
    best = abs(values[order[0]] - target)
    for i in order[1:]:
        error = abs(sum(values[k] for k in [*members, i]) / (len(members) + 1) - target)
        if error < best or (ties and error == best):
            members.append(i)
            best = error
    return tuple(members), -best


@pytest.mark.parametrize("ties", [False, True])
def test_every_small_soup_is_that_of_the_definition(ties):
    """Quarters, so that float32 and float64 agree on what is equal."""
    for values in itertools.product((0.0, 1.0, 2.0, 4.0), repeat=4):
        soup = greedy(values, near(1.0), ties=ties)
        members, score = plain_greedy(values, 1.0, ties)
        assert soup.members == members, values
        assert soup.score == pytest.approx(score, abs=1e-6)
        mean = sum(values[i] for i in members) / len(members)
        assert soup.weights["w"].item() == pytest.approx(mean)


def test_a_tie_is_let_in_only_where_asked():
    values = [3.0, 3.0, 9.0]
    assert greedy(values, near(3.0)).members == (0,)
    assert greedy(values, near(3.0), ties=True).members == (0, 1)


def test_candidates_are_tried_in_the_order_of_their_own_scores():
    seen = []

    def score(weights):
        seen.append(weights["w"].item())
        return seen[-1]

    soup = greedy([2.0, 8.0, 4.0], score)
    assert seen == [2.0, 8.0, 4.0, 6.0, 5.0]  # each alone, then 8 with 4, then 8 with 2
    assert soup.members == (1,)
    assert soup.scores == (2.0, 8.0, 4.0)
    assert soup.tried == {1: 8.0, 2: 6.0, 0: 5.0}
    assert soup.weights["w"].item() == 8.0


def test_scores_that_are_known_are_not_asked_for_again():
    calls = []

    def score(weights):
        calls.append(weights["w"].item())
        return 1.0

    soup = greedy([1.0, 2.0, 6.0], score, scores=[0.2, 0.5, 0.5])
    assert calls == [4.0, 3.0]  # 2 with 6, then all three
    assert soup.members == (1, 2)
    assert soup.score == 1.0
    assert soup.tried == {1: 0.5, 2: 1.0, 0: 1.0}


def test_a_score_of_nan_is_a_rejection():
    def score(weights):
        value = weights["w"].item()
        return math.nan if value in (1.0, 3.5) else value

    soup = greedy([1.0, 4.0, 3.0], score, ties=True)
    assert soup.members == (1,)
    assert math.isnan(soup.tried[2])  # the mean 3.5
    assert math.isnan(soup.tried[0])
    assert math.isnan(soup.scores[0])
    with pytest.raises(ValueError, match="the score of every model is nan"):
        greedy([1.0, 1.0], score)


def test_a_score_that_writes_into_the_candidate_spoils_nothing():
    def score(weights):
        value = weights["w"].item()
        weights["w"].fill_(100.0)
        return -abs(value - 3.0)

    soup = greedy([1.0, 2.0, 6.0], score, scores=[-2.5, -2.0, -3.0])
    assert soup.members == (1, 0, 2)
    assert soup.weights["w"].item() == pytest.approx(3.0)


@pytest.mark.parametrize("dtype", list(KINDS.values()))
def test_the_weights_of_a_greedy_soup_are_those_that_were_scored_to_the_bit(dtype):
    models = [{"w": torch.randn(50, dtype=dtype), "n": torch.tensor(i)} for i in range(6)]
    seen = []

    def score(weights):
        seen.append(snapshot(weights))
        return float(len(seen))  # each one is better

    soup = greedy_soup(models, score)
    assert soup.members == (5, 4, 3, 2, 1, 0)
    assert soup.weights["w"].equal(seen[-1]["w"])
    assert soup.weights["n"].item() == seen[-1]["n"].item() == 0
    assert_equal(soup.weights, plain_mean(models[::-1]))


def test_a_score_that_writes_into_the_candidate_leaves_the_models_alone():
    models = [{"w": torch.tensor([float(i)]), "n": torch.tensor([i])} for i in (1, 2)]

    def score(weights):
        value = weights["w"].item()
        weights["n"].fill_(100)
        return value

    greedy_soup(models, score, scores=[1.0, 2.0])
    assert [m["n"].item() for m in models] == [1, 2]


def test_integers_are_never_rounded():
    count = torch.tensor(2**40 + 1)  # float32 has no such number
    assert uniform_soup([{"n": count}])["n"].item() == 2**40 + 1
    assert uniform_soup([{"n": count - 1}, {"n": count}])["n"].item() == 2**40 + 1


def test_a_greedy_soup_of_one_is_the_best_model_to_the_bit():
    models = [Tied(0), Tied(1)]
    soup = greedy_soup(models, lambda weights: float(weights["seen"] == 1))
    assert soup.members == (1,)
    assert_equal(soup.weights, models[1].state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_greedy_soup_holds_the_mean_a_candidate_and_one_model(dtype):
    loaders = Loaders(5, dtype)
    with LiveBytes() as memory:
        soup = greedy_soup(loaders.all(), lambda weights: -abs(weights["0"][0].item() - 2.0))
    assert loaders.loads == [2] * 5
    assert soup.members[0] == 2
    assert len(soup.tried) == 5
    mean = 10 * SIZE * 4
    assert memory.peak <= mean + 2 * loaders.size + 2 * SIZE * 4 + SIZE + 100


def test_what_is_no_greedy_soup_is_refused():
    with pytest.raises(ValueError, match="no models"):
        greedy([], near(0.0))
    with pytest.raises(ValueError, match="1 scores for 2 models"):
        greedy([1.0, 2.0], near(0.0), scores=[1.0])
    with pytest.raises(ValueError, match=r"models\[0\] and models\[1\] differ: .*bias"):
        greedy_soup([nn.Linear(1, 1, bias=False), nn.Linear(1, 1)], lambda w: len(w))
