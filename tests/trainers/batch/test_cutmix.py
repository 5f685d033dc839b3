"""CutMix: boxes read off the images, and areas against a loop over the definition."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from plain import STEPS, assert_weights, erm, plain_training, run_of, sgd
from torch import nn

from dgavg import Run, UserError, chain, fit
from dgavg.models import Model
from dgavg.seeding import random_state
from dgavg.testing import ToyBatches, check_link

HEIGHT, WIDTH = 6, 9


class Pictures(ToyBatches):
    """Images (2, 6, 9) in which no number occurs twice."""

    def __call__(self, t):
        batch = super().__call__(t)
        random = torch.Generator().manual_seed(t)
        return replace(
            batch, x=torch.rand(len(batch.y), 2, HEIGHT, WIDTH, generator=random) + batch.d[0]
        )


class Flat(ToyBatches):
    def __call__(self, t):
        batch = super().__call__(t)
        return replace(batch, x=batch.x.flatten(1))


def pictures(domains=3, rows=4, batches=Pictures, **settings):
    model = Model(nn.Flatten(), nn.Linear(2 * HEIGHT * WIDTH, 3))
    links = chain("cutmix_basic", cutmix=settings)
    return Run(links, model, batches(domains, rows), steps=STEPS, optimizer=sgd)


def cut(run, t=0):
    run.t = t
    batch = run.batches(t)
    return batch, run.prepare(batch)


def read(batch, found):
    """Of each row its partner and box (rows and columns that it spans), off the images alone."""
    boxes = []
    for i in range(len(batch.x)):
        foreign = (found.x[i] != batch.x[i]).all(dim=0)
        assert foreign.equal((found.x[i] != batch.x[i]).any(dim=0))
        if not foreign.any():
            boxes.append((None, (0, 0), (0, 0)))
            continue
        rows, columns = (torch.nonzero(foreign.any(dim=d)).flatten() for d in (1, 0))
        spans = tuple((int(k[0]), int(k[-1]) + 1) for k in (rows, columns))
        assert foreign.sum() == len(rows) * len(columns)  # a box, all of it
        assert all(b - a == len(k) for (a, b), k in zip(spans, (rows, columns), strict=True))
        same = [j for j in range(len(batch.x)) if (found.x[i] == batch.x[j])[:, foreign].all()]
        boxes.append((same[0], *spans))
    return boxes


def area(box):
    _, (top, bottom), (left, right) = box
    return (bottom - top) * (right - left)


def test_across_domains_boxes_come_from_the_same_row_of_the_next_domain_in_one_cycle():
    run, cycles = pictures(alpha=20.0), set()
    for t in range(12):
        boxes = read(*cut(run, t))
        partner = [boxes[4 * d][0] // 4 for d in range(3)]
        assert [b[0] for b in boxes] == [4 * partner[i // 4] + i % 4 for i in range(12)]
        assert sorted(partner) == [0, 1, 2]
        assert all(partner[d] != d for d in range(3))
        cycles.add(tuple(partner))
    assert len(cycles) == 2  # all cycles of three domains


def test_within_domains_boxes_come_from_a_random_order_of_the_domain():
    run, orders = pictures(rows=6, alpha=20.0, across=False), set()
    for t in range(8):
        partners = [i if b[0] is None else b[0] for i, b in enumerate(read(*cut(run, t)))]
        for d in range(3):
            assert sorted(partners[6 * d : 6 * d + 6]) == list(range(6 * d, 6 * d + 6))
        orders.add(tuple(partners))
    assert len(orders) == 8


def test_a_domain_has_one_box_and_labels_by_its_true_area():
    run, boxes = pictures(alpha=0.7), set()
    for t in range(20):
        batch, found = cut(run, t)
        here = read(batch, found)
        y = F.one_hot(batch.y, 3).float()
        for i, box in enumerate(here):
            assert box[1:] == here[i // 4 * 4][1:]
            share = 1 - area(box) / (HEIGHT * WIDTH)
            partner = i if box[0] is None else box[0]
            expected = share * y[i] + (1 - share) * y[partner]
            torch.testing.assert_close(found.y[i], expected)
        boxes |= {box[1:] for box in here}
    assert len(boxes) > 30


def plain_box(random, alpha):
    """A box by the paper's words, one pixel after another."""
    side = np.sqrt(1 - random.beta(alpha, alpha))
    spans = []
    for length in (HEIGHT, WIDTH):
        size, centre = round(length * side), random.integers(length)
        first = centre - size // 2
        spans.append([k for k in range(first, first + size) if 0 <= k < length])
    return spans


@pytest.mark.parametrize("alpha", [0.3, 1.0, 8.0])
def test_boxes_are_distributed_as_in_the_paper(alpha):
    random, expected, found = np.random.default_rng(0), [], []
    for _ in range(4000):
        rows, columns = plain_box(random, alpha)
        expected.append((len(rows), len(columns), len(rows) * len(columns)))
    run = pictures(domains=8, rows=1, alpha=alpha)
    for t in range(150):
        for _, (top, bottom), (left, right) in read(*cut(run, t)):
            found.append((bottom - top, right - left, (bottom - top) * (right - left)))
    expected, found = np.array(expected, float), np.array(found, float)
    # rows and columns of an empty box cannot be read off an image
    expected[expected[:, 2] == 0] = 0
    error = expected.std(axis=0) / np.sqrt(len(found))
    assert (np.abs(found.mean(axis=0) - expected.mean(axis=0)) < 4 * error).all()
    np.testing.assert_allclose(found.std(axis=0), expected.std(axis=0), rtol=0.12)


def test_boxes_stand_anywhere_and_are_cut_off_at_the_edges():
    run, tops, lefts = pictures(domains=8, rows=1, alpha=50.0), set(), set()
    for t in range(60):
        for _, rows, columns in read(*cut(run, t)):
            tops.add(rows)
            lefts.add(columns)
    # of side √½: 4 of 6 rows, 6 of 9 columns
    assert {(0, 2), (0, 4), (1, 5), (2, 6), (3, 6)} <= tops
    assert {(0, 3), (0, 6), (3, 9), (5, 9)} <= lefts


@pytest.mark.parametrize(("p", "share"), [(0.0, 0.0), (0.3, 0.3), (1.0, 1.0)])
def test_a_share_p_of_domains_and_steps_is_cut(p, share):
    run = pictures(domains=8, rows=1, alpha=20.0, p=p)
    cuts = [area(box) > 0 for t in range(60) for box in read(*cut(run, t))]
    assert np.mean(cuts) == pytest.approx(share, abs=0.08 if 0 < p < 1 else 0)


def test_what_is_not_cut_keeps_its_label():
    batch, found = cut(pictures(p=0.0))
    assert found.x.equal(batch.x)
    assert found.y.equal(F.one_hot(batch.y, 3).float())


def test_the_batch_keeps_its_originals_domains_and_weights():
    run = pictures()
    batch = replace(run.batches(0), weights=torch.tensor([1.0, 0.0, 0.0]))
    found = run.prepare(batch)
    assert found.d.equal(batch.d)
    assert found.weights is batch.weights
    assert batch.x.equal(run.batches(0).x)


def test_the_draw_is_the_same_within_a_step_another_in_the_next_and_no_global_one():
    before = random_state()
    run = pictures(alpha=20.0)
    before = random_state()
    found = [cut(run, t)[1].x for t in (3, 3, 4)]
    run.seed = 1
    assert found[0].equal(found[1])
    assert not (run.batches(4).x == found[2]).equal(run.batches(3).x == found[0])
    assert not cut(run, 3)[1].x.equal(found[0])
    assert random_state()["numpy"] == before["numpy"]
    assert random_state()["torch"].equal(before["torch"])


def test_labels_that_are_probabilities_already_are_mixed_too():
    run = pictures()
    batch = run.batches(0)
    soft = replace(batch, y=F.one_hot(batch.y, 3).float() * 0.7 + 0.1)
    torch.testing.assert_close(run.prepare(soft).y, run.prepare(batch).y * 0.7 + 0.1)


def test_training_is_that_on_both_labels():
    run = run_of("cutmix_basic", {"cutmix": {"across": False}})
    mixed = {}
    for t in range(STEPS):
        run.t = t
        mixed[t] = run.prepare(run.batches(t))
    run.t = 0
    fit(run)
    expected = plain_training(lambda model, batch, t: erm(model, mixed[t], t))
    assert_weights(run.live, expected.state_dict())
    assert any(not mixed[t].x.equal(run.batches(t).x) for t in range(STEPS))


def test_inputs_that_are_no_images_are_refused():
    with pytest.raises(UserError, match=r"images \(N, C, H, W\): inputs of shape \(12, 4\)"):
        pictures(batches=Flat)


def test_one_domain_is_refused_across_and_fine_within():
    with pytest.raises(UserError, match=r"here is 1; or write trainer\.cutmix\.across=false"):
        pictures(domains=1)
    run = pictures(domains=1, across=False, alpha=20.0)
    batch, found = cut(run)
    assert not found.x.equal(batch.x)
    run = pictures()
    with pytest.raises(UserError, match="'cutmix' mixes across domains, and here is one"):
        run.prepare(run.batches(0).split()[0])


@pytest.mark.parametrize(("key", "value"), [("alpha", 0), ("p", -0.1), ("p", 1.1)])
def test_settings_out_of_range_are_refused(key, value):
    with pytest.raises(UserError, match=rf"trainer\.cutmix\.{key}="):
        chain("cutmix_basic", cutmix={key: value})


@pytest.mark.parametrize("across", [True, False])
def test_the_contract_holds_for_cutmix(across):
    check_link("cutmix", across=across)
