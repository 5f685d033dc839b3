"""Images that stay where they are, and batches that a thread brings."""

import gc
import threading
import time
import weakref

import numpy as np
import pytest
import torch

from dgavg.data import TrainingBatches, load, make_splits, stream
from dgavg.data.augment import AUGMENTATIONS
from dgavg.data.sampler import BLOCK
from dgavg.data.stream import DEPTH, Ahead, Images, ahead, room

CPU = torch.device("cpu")


def drawn(*shape):
    rng = torch.Generator().manual_seed(len(shape))
    return torch.randint(0, 256, shape, generator=rng, dtype=torch.uint8)


def parts_of(kind):
    """Parts of two tensors, the second twice; and all their images in a row."""
    a, b = drawn(9, 3, 4, 5), drawn(20, 4, 5, 3).movedim(-1, 1)  # one is not contiguous
    if kind == "features":
        a, b = drawn(9, 60, 1, 1).half(), drawn(20, 60, 1, 1).half()
    parts = [(a, torch.tensor([8, 0, 3])), (b, torch.tensor([19, 2])), (b, torch.tensor([2, 7, 5]))]
    return parts, torch.cat([images[keys] for images, keys in parts])


@pytest.mark.parametrize("kind", ["pictures", "features"])
@pytest.mark.parametrize("resident", [True, False])
def test_rows_are_those_of_all_parts_in_a_row(kind, resident):
    parts, expected = parts_of(kind)
    images = Images(parts, CPU, resident)
    assert len(images) == 8
    assert images.resident == resident
    for rows in ([0, 1, 2], [7, 0, 3, 3, 5], [4, 3], [], [6, 7, 0]):
        rows = torch.tensor(rows, dtype=torch.int64)
        found = images.take(rows)
        assert torch.equal(found, expected[rows])
        assert found.dtype == expected.dtype
        assert torch.equal(images.gather(rows), expected[rows])
        assert torch.equal(images.rows(rows), expected[rows])
    assert torch.equal(images.rows(slice(2, 6)), expected[2:6])


def test_images_that_are_not_resident_are_not_copied():
    source = drawn(5, 3, 2, 2)
    images = Images([(source, torch.arange(5))], CPU, False)
    source[3] = 9
    assert images.take(torch.tensor([3])).unique().tolist() == [9]


def test_what_is_small_is_copied(monkeypatch):
    part = (drawn(5, 3, 2, 2), torch.arange(4))
    for small, expected in ((48, True), (47, False)):
        monkeypatch.setattr(stream, "SMALL", small)
        assert room(CPU) == small
        assert Images([part], CPU).resident == expected
        assert Images([part], CPU, True).resident
        assert not Images([part], CPU, False).resident


def test_half_of_what_is_free_on_a_gpu(monkeypatch):
    """Numbers as the driver gives them; memory that torch holds but does not use is free too."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    assert room(torch.device("cuda")) == 600


def test_a_copy_in_pieces(monkeypatch):
    parts, expected = parts_of("pictures")
    monkeypatch.setattr(stream, "SMALL", 130)  # two images
    assert torch.equal(Images(parts, CPU, True).take(torch.arange(8)), expected)


def work_of(seen):
    def work(i):
        seen.append((i, threading.current_thread() is threading.main_thread()))
        return i * i

    return work


def wait_for(seen, n):
    for _ in range(500):
        if len(seen) >= n:
            return
        time.sleep(0.01)


def test_the_next_ones_are_made_meanwhile():
    seen = []
    get = Ahead(work_of(seen))
    assert get(0) == 0
    wait_for(seen, 1 + DEPTH)
    assert seen[0] == (0, True)
    assert seen[1:] == [(i + 1, False) for i in range(DEPTH)]
    for t in range(1, 10):
        assert get(t) == t * t
        wait_for(seen, 1 + DEPTH + t)
    assert sorted(i for i, _ in seen) == list(range(10 + DEPTH))  # each once
    assert get(50) == 2500
    assert get(50) == 2500
    assert get(3) == 9
    assert get(4) == 16
    assert sorted(get._ready) == [5, 6]  # nothing else is kept


def test_what_fails_ahead_fails_when_it_is_asked_for():
    def work(i):
        if i == 2:
            raise OSError("unplugged")
        return i

    get = Ahead(work)
    assert [get(0), get(1)] == [0, 1]
    with pytest.raises(OSError, match="unplugged"):
        get(2)
    found = ahead(work, range(5))
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(OSError, match="unplugged"):
        next(found)


def test_ahead_is_a_map_that_reads_little_further():
    seen = []
    found = ahead(work_of(seen), range(100))
    assert next(found) == 0
    wait_for(seen, 1 + DEPTH)
    time.sleep(0.05)
    assert [i for i, _ in seen] == list(range(1 + DEPTH))
    assert not any(main for _, main in seen)
    found.close()
    assert list(ahead(work_of([]), range(7))) == [i * i for i in range(7)]
    assert list(ahead(work_of([]), [])) == []


@pytest.fixture
def data(make_data):
    return make_data([60, 200, 45, 90])


def batches(data, resident, augment="none", domains=(0, 1, 3)):
    return TrainingBatches(
        data,
        make_splits(data, 0.2, 0),
        domains,
        batch_size=4,
        seed=3,
        device="cpu",
        augment=augment,
        resident=resident,
    )


@pytest.mark.parametrize("augment", list(AUGMENTATIONS))
def test_streamed_batches_are_the_same_to_the_bit(data, augment):
    held, streamed = batches(data, True, augment), batches(data, False, augment)
    in_order = range(BLOCK - 3, BLOCK + 6)
    for t in (*in_order, 0, 5, 5, 6, 4, 5 * BLOCK - 1, 5 * BLOCK, 7):
        a, b = held(t), streamed(t)
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.y, b.y)
        assert torch.equal(a.d, b.d)
    for size in (1, 17, 1000):
        for x, y in zip(held.pooled(size), streamed.pooled(size), strict=True):
            assert torch.equal(x, y)


def test_a_run_that_resumes_meets_the_same_batches(data):
    first = batches(data, False, "domainbed")
    whole = [first(t).x for t in range(20)]
    again = batches(data, False, "domainbed")
    assert all(torch.equal(again(t).x, whole[t]) for t in range(11, 20))


def test_a_streamed_batch_is_its_own(data):
    sample = batches(data, False)
    first = sample(0)
    before = first.x.clone()
    for t in range(1, 8):
        sample(t).x.zero_()
    assert torch.equal(first.x, before)


@pytest.mark.parametrize("resident", [True, False])
def test_batches_go_with_the_last_that_knows_them(data, resident):
    """At once: a copy on a GPU must not wait for the garbage collector."""
    sample = batches(data, resident)
    sample(0), sample(1)
    images = weakref.ref(sample._images)
    gc.disable()
    try:
        del sample
        for _ in range(200):  # the thread lets go of its last batch
            if images() is None:
                break
            time.sleep(0.01)
        assert images() is None
    finally:
        gc.enable()


def test_features_become_batches(make_data):
    rng = np.random.default_rng(0)
    data = make_data([30, 40, 35], shape=(6, 1, 1))
    for domain in data.domains:
        values = rng.standard_normal((len(domain), 6, 1, 1)).astype(np.float16)
        object.__setattr__(domain, "images", torch.from_numpy(values))
    for resident in (True, False):
        sample = batches(data, resident, domains=(0, 2))
        batch = sample(0)
        assert batch.x.dtype == torch.float32
        known = torch.cat([data.domains[i].images for i in (0, 2)]).float()
        assert all((known == x).flatten(1).all(1).any() for x in batch.x)


def test_batches_from_a_cache(write_tree):
    names = [f"{i}.png" for i in range(20)]
    tree = {domain: {"cat": names, "dog": names} for domain in ("a", "b", "c")}
    root = write_tree(tree, side=12)
    mapped, plain = (load("folder", root=str(root), size=10, cache=c) for c in (None, "none"))
    streamed, held = batches(mapped, False, domains=(0, 2)), batches(plain, True, domains=(0, 2))
    for t in range(5):
        assert torch.equal(streamed(t).x, held(t).x)
