"""LossValley against the authors' listing and the paper's definition, both on stored weights."""

from __future__ import annotations

import copy
import io
import math
from collections import Counter, deque

import numpy as np
import pytest
import torch
from live_bytes import LiveBytes

from dgavg.averaging.valley import LossValley
from dgavg.testing.contract import same


def code_valley(segments, losses, n_converge, n_tolerance, ratio):
    """What the authors' class returns for the means of segments and their losses, in float64.

    `final` lists what its average was updated with; the first update overwrites what it began with.
    """
    converging, tolerated = deque(maxlen=n_converge), deque(maxlen=n_tolerance)
    start, final, dead = None, [], False
    for item in zip(range(len(losses)), segments, losses, strict=True):
        if dead:
            break
        converging.append(item)
        tolerated.append(item)
        if start is None:
            window = [loss for *_, loss in converging]
            if len(window) == n_converge and int(np.argmin(window)) == 0:
                start = converging[0]
                threshold = np.mean(window) * (1 + ratio)
                if n_tolerance < n_converge:
                    final += [converging[1 + i] for i in range(n_converge - n_tolerance)]
                elif n_tolerance > n_converge:
                    queue, k = list(tolerated)[: n_tolerance - n_converge + 1], 0
                    for i in reversed(range(len(queue))):
                        if queue[i][2] > threshold:
                            k = i + 1
                            break
                    final += queue[k + 1 :]
            continue
        if tolerated[0][0] < start[0]:
            continue
        if min(loss for *_, loss in tolerated) > threshold:
            dead = True
            continue
        final.append(tolerated[0])
    if start is None:
        return converging[-1][1]
    if not dead:
        tolerated.popleft()
        while tolerated and min(loss for *_, loss in tolerated) <= threshold:
            final.append(tolerated.popleft())
    return np.mean([w for _, w, _ in final or [start]], axis=0)


def paper_valley(segments, losses, n_converge, n_tolerance, ratio):
    """The mean of iterates from the lowest loss to before it stays above the tolerance."""
    n = len(losses)
    starts = [t for t in range(n - n_converge + 1) if losses[t] == min(losses[t : t + n_converge])]
    if not starts:
        return np.mean(segments[-1], axis=0)
    start = starts[0]
    over = [loss > (1 + ratio) * losses[start] for loss in losses]
    ends = [t for t in range(start, n - n_tolerance + 1) if all(over[t : t + n_tolerance])]
    inside = [segments[start][-1:], *segments[start + 1 : ends[0] if ends else n]]
    return np.mean(np.concatenate(inside), axis=0)


def curve(random):
    """Losses of up to 25 evaluations: noise, a noisy valley, a smooth one."""
    n, low = random.integers(1, 26), random.integers(0, 12)
    kind, i = random.integers(3), np.arange(n)
    if kind == 0:
        return random.integers(1, 8, n).astype(float)
    noise = random.random(n) * 0.3 if kind == 1 else 0
    return 1 + np.abs(i - low) / random.choice([3, 10, 20]) + noise


def replay(valley, segments, losses, live=None):
    """Feed the weights; yields the number of evaluations after each of them."""
    live = live or {"w": torch.zeros(segments[0].shape[1], dtype=torch.float64)}
    for i, (segment, loss) in enumerate(zip(segments, losses, strict=True)):
        for weights in segment:
            live["w"].copy_(torch.from_numpy(weights))
            valley.update(live)
        valley.evaluated(live, loss)
        yield i + 1


def fresh(**settings):
    return LossValley({"w": torch.zeros(3, dtype=torch.float64)}, **settings)


WINDOWS = [(3, 6), (3, 3), (5, 2), (1, 3), (1, 1), (2, 3), (2, 5), (4, 7), (6, 4)]


@pytest.mark.parametrize(("n_converge", "n_tolerance"), WINDOWS)
@pytest.mark.parametrize("rule", ["paper", "code"])
def test_after_every_evaluation_it_is_what_the_definition_says(rule, n_converge, n_tolerance):
    random = np.random.default_rng(n_converge * 10 + n_tolerance)
    for _ in range(40):
        losses = curve(random)
        ratio = random.choice([0.0, 0.1, 0.2, 0.3, 1.0])
        settings = (n_converge, n_tolerance, ratio)
        segments = [random.normal(size=(random.integers(1, 5), 3)) for _ in losses]
        valley = fresh(
            n_converge=n_converge, n_tolerance=n_tolerance, tolerance_ratio=ratio, rule=rule
        )
        for n in replay(valley, segments, losses):
            if rule == "code":
                means = [segment.mean(axis=0) for segment in segments[:n]]
                expected = code_valley(means, losses[:n], *settings)
            else:
                expected = paper_valley(segments[:n], losses[:n], *settings)
            found = valley.weights()["w"].numpy()
            np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def counted(losses, **settings):
    """How often each segment counts: segments of one weight each, told apart by a one-hot."""
    n = len(losses)
    valley = LossValley({"w": torch.zeros(n, dtype=torch.float64)}, **settings)
    for _ in replay(valley, np.eye(n)[:, None, :], losses):
        pass
    shares = valley.weights()["w"]
    least = shares[shares > 1e-9].min()
    return {i: round(float(s / least)) for i, s in enumerate(shares) if s > 1e-9}, valley


VALLEY = [1 + (i - 9) ** 2 / 280 for i in range(30)]  # lowest at segment 9


@pytest.mark.parametrize(
    ("losses", "settings", "expected"),
    [
        (VALLEY, {}, [7, 8, 9, 9, *range(10, 19)]),
        (VALLEY, {"n_converge": 3, "n_tolerance": 3}, range(10, 19)),
        (VALLEY, {"n_converge": 5, "n_tolerance": 2}, range(10, 19)),
        ([9.0, *VALLEY[9:]], {}, [1, 2, 2, 3, 3, *range(4, 11)]),  # the windows are read again
        (VALLEY[9:], {}, [0, 0, 0, 1, 1, 2, 2, *range(3, 10)]),  # and again while not yet full
        (VALLEY[3:12], {}, [4, 4, 5, 5, 6, 6, 7, 8]),  # training ends as it converges
        (VALLEY[3:13], {}, [4, 5, 5, 6, 6, 7, 8, 9]),  # one evaluation later
        (VALLEY[:10], {}, [9]),  # never converged: the last segment
        (VALLEY[:11], {}, [10]),
        ([1.0, 5.0, 5.0, 5.0, 5.0], {"n_tolerance": 3}, [0]),  # nothing but its beginning
    ],
)
def test_rule_code_counts_as_often_as_the_authors_code(losses, settings, expected):
    found, _ = counted(losses, rule="code", **settings)
    assert found == Counter(expected)


@pytest.mark.parametrize(("ratio", "last"), [(0.3, 18), (0.2, 16)])
def test_rule_paper_ends_where_the_loss_stays_above_the_tolerance(ratio, last):
    found, valley = counted(VALLEY, tolerance_ratio=ratio)
    assert found == Counter(range(9, last + 1))
    assert valley.ended


def test_losses_within_the_tolerance_bring_back_those_above_it():
    up_and_down = [1.0, *[2.0] * 5, 1.3, *[2.0] * 5]
    found, valley = counted(up_and_down)
    assert found == Counter(range(12))
    assert not valley.ended
    found, valley = counted([*up_and_down, 2.0, 1.0])
    assert found == Counter(range(7))
    assert valley.ended


def test_a_valley_may_have_ended_before_its_beginning_is_sure():
    settings = {"n_converge": 5, "n_tolerance": 2}
    found, valley = counted([1.0, 1.1, 5.0, 5.0, 1.0], **settings)
    assert found == Counter([0, 1])
    assert valley.ended
    found, valley = counted([1.0, 5.0, 5.0, 0.9, 0.9, 1.0, 1.0, 1.0], **settings)
    assert found == Counter(range(3, 8))
    assert not valley.ended


@pytest.mark.parametrize("rule", ["paper", "code"])
def test_once_ended_it_stays_as_it_is(rule):
    valley = fresh(rule=rule, n_converge=1, n_tolerance=2)
    live = {"w": torch.ones(3)}
    for loss in (1.0, 9.0, 9.0, 9.0):
        assert not valley.ended
        valley.update(live)
        valley.evaluated(live, loss)
        if valley.ended:
            break
    before = copy.deepcopy(valley.state_dict())
    live["w"].fill_(7.0)
    valley.update(live)
    valley.evaluated(live, 0.1)
    assert valley.ended
    assert valley.weights()["w"].tolist() == [1.0] * 3
    assert same(valley.state_dict(), before)


@pytest.mark.parametrize("rule", ["paper", "code"])
def test_before_convergence_it_is_the_open_segment_or_else_the_last(rule):
    valley = fresh(rule=rule)
    live = {"w": torch.zeros(3)}
    found = []
    for i, loss in enumerate((3.0, None, 2.0, None)):
        live["w"].fill_(i)
        valley.update(live)
        found.append(valley.weights()["w"][0].item())
        if loss is not None:
            valley.evaluated(live, loss)
            found.append(valley.weights()["w"][0].item())
    assert found == [0.0, 0.0, 1.0, 1.5, 1.5, 3.0]


@pytest.mark.parametrize("rule", ["paper", "code"])
def test_after_convergence_weights_that_no_evaluation_has_seen_do_not_count(rule):
    valley = fresh(rule=rule, n_converge=1)
    live = {"w": torch.zeros(3)}
    valley.update(live)
    valley.evaluated(live, 1.0)
    live["w"].fill_(1.0)
    valley.update(live)
    assert valley.weights()["w"].tolist() == [0.0] * 3
    valley.evaluated(live, 1.0)
    assert valley.weights()["w"].tolist() == [0.5] * 3


@pytest.mark.parametrize("rule", ["paper", "code"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_without_bound_is_no_minimum_and_not_tolerated(rule, bad):
    found, valley = counted([bad, bad, bad, 1.0, 1.1, 1.2, bad], rule=rule, n_tolerance=3)
    assert found == Counter({"paper": [3, 4, 5], "code": [4, 5]}[rule])
    assert valley.ended == (rule == "paper")
    assert counted([bad] * 4, rule=rule)[0] == {3: 1}
    found, _ = counted([bad, 1.0, 1.0], rule=rule, n_converge=1, n_tolerance=1)
    assert found == Counter({"paper": [1, 2], "code": [2]}[rule])
    assert counted([bad], rule=rule, n_converge=1)[0] == {0: 1}


@pytest.mark.parametrize("rule", ["paper", "code"])
def test_an_evaluation_without_new_weights_is_ignored(rule):
    valley, once = fresh(rule=rule, n_converge=2), fresh(rule=rule, n_converge=2)
    live = {"w": torch.zeros(3)}
    valley.evaluated(live, 0.5)  # before the first weights, too
    for i, loss in enumerate((2.0, 1.0, 1.2)):
        live["w"].fill_(i)
        for v in (valley, once):
            v.update(live)
            v.evaluated(live, loss)
        valley.evaluated(live, 3.0)
    assert valley.weights()["w"].equal(once.weights()["w"])
    assert valley.rule.state_dict() == once.rule.state_dict()


@pytest.mark.parametrize(("n_converge", "n_tolerance"), WINDOWS)
@pytest.mark.parametrize("rule", ["paper", "code"])
def test_no_more_sums_are_ever_alive_than_promised(rule, n_converge, n_tolerance):
    size = 1 << 12
    live = {"w": torch.randn(size)}
    random = np.random.default_rng(n_tolerance)
    most = 3 if rule == "paper" else max(n_converge, n_tolerance, 3)
    peaks = []
    for _ in range(15):
        with LiveBytes() as memory:
            valley = LossValley(live, n_converge=n_converge, n_tolerance=n_tolerance, rule=rule)
            for loss in curve(random):
                valley.update(live)
                valley.evaluated(live, loss)
                valley.update(live)
        peaks.append(memory.peak / (4 * size))
        if valley.ended:
            assert sum(memory.live.values()) / (4 * size) == 1
    assert 2 <= max(peaks) <= most


@pytest.mark.parametrize(("n_converge", "n_tolerance"), [(3, 6), (1, 3), (5, 2)])
@pytest.mark.parametrize("rule", ["paper", "code"])
def test_saved_at_any_point_it_goes_on_to_the_bit(rule, n_converge, n_tolerance):
    random = np.random.default_rng(7)
    settings = {"n_converge": n_converge, "n_tolerance": n_tolerance, "rule": rule}
    for _ in range(5):
        losses = curve(random)
        weights = torch.from_numpy(random.normal(size=(3 * len(losses), 3)))
        live = {"w": torch.zeros(3, dtype=torch.float64)}
        whole, parts = fresh(**settings), fresh(**settings)
        for i, w in enumerate(weights):
            live["w"].copy_(w)
            for valley in (whole, parts):
                valley.update(live)
                if i % 3 == 2:
                    valley.evaluated(live, losses[i // 3])
            file = io.BytesIO()
            torch.save(parts.state_dict(), file)
            file.seek(0)
            # Into a new one, and into one that has seen other things.
            parts = fresh(**settings) if i % 2 else parts
            if i % 4 == 0:
                parts.evaluated(live, 5.0)
            parts.load_state_dict(torch.load(file, weights_only=True))
            assert parts.weights()["w"].equal(whole.weights()["w"])
        assert parts.rule.state_dict() == whole.rule.state_dict()
        assert parts.ended == whole.ended


def test_a_copy_goes_its_own_way():
    live = {"w": torch.zeros(3)}
    valley = LossValley(live, n_converge=1)
    valley.update(live)
    valley.evaluated(live, 1.0)
    valley.update(live)
    other = copy.deepcopy(valley)
    live["w"].fill_(1.0)
    other.update(live)
    other.evaluated(live, 1.0)
    assert valley.weights()["w"].tolist() == [0.0] * 3
    assert other.weights()["w"].tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("rule", ["paper", "code"])
@pytest.mark.parametrize("after", [1, 4, 12])
def test_restarted_it_is_as_new(rule, after):
    segments = np.random.default_rng(3).normal(size=(21, 2, 3))
    used, new = fresh(rule=rule, n_tolerance=2), fresh(rule=rule, n_tolerance=2)
    live = {"w": torch.zeros(3, dtype=torch.float64)}
    list(replay(used, segments[:after], VALLEY[9 : 9 + after], live))
    assert used.ended == (after == 12)
    used.restart()
    with pytest.raises(ValueError, match="no weights have been averaged yet"):
        used.weights()
    both = (replay(valley, segments[12:], VALLEY[5:14], live) for valley in (used, new))
    for _ in zip(*both, strict=True):
        assert used.weights()["w"].equal(new.weights()["w"])
    assert used.rule.state_dict() == new.rule.state_dict()
    assert used.calls == new.calls


def test_a_loss_may_be_0():
    found, valley = counted([1.0, 0.0, 0.0, 0.1], n_converge=2, n_tolerance=1)
    assert found == {1: 1, 2: 1}
    assert valley.ended
