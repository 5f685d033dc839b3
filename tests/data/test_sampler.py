import numpy as np
import pytest
import torch

from dgavg.data import Domain, DomainDataset, Splits, TrainingBatches, load, make_splits
from dgavg.data.augment import AUGMENTATIONS
from dgavg.data.sampler import BLOCK

CUDA = pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
)
DEVICES = ["cpu", CUDA]


@pytest.fixture
def data(make_data):
    return make_data([60, 200, 45, 90])


def batches(data, domains=(0, 1, 3), *, batch_size=4, seed=0, device="cpu", augment="none"):
    splits = make_splits(data, 0.2, 0)
    return TrainingBatches(
        data, splits, domains, batch_size=batch_size, seed=seed, device=device, augment=augment
    )


def same(a, b):
    return torch.equal(a.x, b.x) and torch.equal(a.y, b.y) and torch.equal(a.d, b.d)


def key_of(data, domain, x):
    """Which image of the domain the float image x is."""
    pixels = (x.cpu() * 255).round().to(torch.uint8)
    return int((data.domains[domain].images == pixels).flatten(1).all(1).nonzero())


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_in_a_batch(data, device):
    sample = batches(data, (3, 0, 1), device=device)
    assert (sample.domains, sample.names) == (3, ("domain3", "domain0", "domain1"))
    training = make_splits(data, 0.2, 0).in_
    for t in (0, 1, BLOCK, 1000):
        batch = sample(t)
        assert batch.x.shape == (12, 3, 8, 8)
        assert batch.x.dtype == torch.float32
        assert batch.x.device.type == device
        assert batch.y.dtype == batch.d.dtype == torch.int64
        assert batch.d.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        assert batch.domains == 3
        for x, y, d in zip(batch.x, batch.y, batch.d, strict=True):
            domain = (3, 0, 1)[d]
            key = key_of(data, domain, x)
            assert key in training[domain]
            assert data.domains[domain].labels[key] == y
            assert torch.equal(x.cpu(), data.domains[domain].images[key] / 255)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("augment", list(AUGMENTATIONS))
def test_batch_t_is_a_pure_function_of_seed_and_t(data, augment, device):
    first = batches(data, augment=augment, device=device)
    forward = [first(t) for t in range(2 * BLOCK + 2)]
    again = batches(data, augment=augment, device=device)
    for t in (2 * BLOCK + 1, 5, BLOCK, BLOCK - 1, 0, 5):
        assert same(again(t), forward[t])
    other = batches(data, augment=augment, device=device, seed=1)
    assert not any(same(other(t), forward[t]) for t in range(3))
    steps = [forward[t].x.flatten().tolist() for t in range(len(forward))]
    assert len({tuple(step) for step in steps}) == len(forward)


def test_rows_do_not_depend_on_the_augmentation(data):
    plain, augmented = batches(data), batches(data, augment="domainbed")
    for t in range(BLOCK + 1):
        assert torch.equal(plain(t).y, augmented(t).y)
        assert not torch.equal(plain(t).x, augmented(t).x)


def test_each_step_and_seed_augments_anew():
    """With one image alone, nothing but the augmentation can tell two batches apart."""
    image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)).mul(255).byte()
    same_images = tuple(
        Domain(name, image.expand(10, -1, -1, -1), torch.zeros(10, dtype=torch.int64))
        for name in "ab"
    )
    data = DomainDataset("one", same_images, ("x",))
    seen = [
        batches(data, (0, 1), seed=s, augment="domainbed")(t).x for s, t in ((0, 0), (0, 1), (1, 0))
    ]
    assert not any(torch.equal(seen[i], seen[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("augment", list(AUGMENTATIONS))
def test_the_global_random_state_is_neither_read_nor_changed(data, augment):
    expected = batches(data, augment=augment)(3)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        np_before, before = np.random.get_state()[1].tolist(), torch.random.get_rng_state()
        sample = batches(data, augment=augment)
        assert same(sample(3), expected)
        list(sample.pooled(16))
        assert torch.equal(torch.random.get_rng_state(), before)
        assert np.random.get_state()[1].tolist() == np_before


def test_rows_are_uniform_with_replacement(data):
    """60 · 0.8 = 48 images, 4 a step: each is drawn about as often; repeats occur in a batch."""
    sample = batches(data, (0, 1), batch_size=4)
    steps, counts, repeats = 3000, {}, 0
    for t in range(steps):
        rows = [bytes(row) for row in (sample(t).x[:4] * 255).round().to(torch.uint8).numpy()]
        repeats += len(set(rows)) < 4
        for row in rows:
            counts[row] = counts.get(row, 0) + 1
    expected = 4 * steps / 48
    assert len(counts) == 48
    chi_squared = sum((n - expected) ** 2 / expected for n in counts.values())
    assert chi_squared < 47 + 5 * (2 * 47) ** 0.5
    assert abs(repeats / steps - (1 - 47 * 46 * 45 / 48**3)) < 0.03


def test_domains_are_drawn_independently(make_data):
    sample = batches(make_data([50, 50]), (0, 1), batch_size=8)
    rows = sample._draw(0).reshape(BLOCK, 2, 8)
    assert rows[:, 0].max() < 40 <= rows[:, 1].min()
    assert not torch.equal(rows[:, 0], rows[:, 1] - 40)


def test_epoch_length(data):
    assert batches(data, (0, 1, 3)).epoch_length == 48 // 4
    assert batches(data, (1, 3), batch_size=7).epoch_length == 72 // 7
    assert batches(data, (2,), batch_size=36).epoch_length == 1


@pytest.mark.parametrize("augment", list(AUGMENTATIONS))
@pytest.mark.parametrize("batch_size", [1, 50, 64, 1000])
def test_pooled_shows_every_training_image_once(data, batch_size, augment):
    sample = batches(data, (0, 1, 3), augment=augment)
    training = make_splits(data, 0.2, 0).in_
    expected = torch.cat([data.domains[i].images[training[i]] for i in (0, 1, 3)])
    parts = list(sample.pooled(batch_size))
    assert all(part.dtype == torch.float32 for part in parts)
    pooled = (torch.cat(parts) * 255).round().to(torch.uint8)
    assert sorted(bytes(x.numpy()) for x in pooled) == sorted(bytes(x.numpy()) for x in expected)
    lengths = [len(part) for part in parts]
    assert max(lengths) <= batch_size
    assert max(lengths) - min(lengths) <= 1
    again = torch.cat(list(batches(data, (0, 1, 3), seed=8, augment=augment).pooled(batch_size)))
    assert torch.equal(torch.cat(parts), again)


def test_pooled_mixes_domains_and_images(data):
    sample = batches(data, (0, 1, 3))
    share = np.array([48, 160, 72]) / 280
    for part in sample.pooled(56):
        domains = [domain_of(data, x) for x in part]
        counts = np.array([domains.count(i) for i in (0, 1, 3)])
        assert (abs(counts - share * len(part)) <= 2).all()
    first = next(sample.pooled(280))
    keys = [key_of(data, 1, x) for x in first if domain_of(data, x) == 1]
    order = make_splits(data, 0.2, 0).in_[1].tolist()
    places = [order.index(key) for key in keys]
    assert abs(np.corrcoef(places, np.arange(160))[0, 1]) < 0.3


def domain_of(data, x):
    pixels = (x * 255).round().to(torch.uint8)
    (found,) = (
        i for i, d in enumerate(data.domains) if (d.images == pixels).flatten(1).all(1).any()
    )
    return found


@pytest.mark.parametrize(
    ("domains", "settings", "parts"),
    [
        ((0, 2), {"batch_size": 37}, ["'domain2'", "36 training", "protocol.batch_size=37", "=36"]),
        ((0, 2), {"batch_size": 0}, ["protocol.batch_size=0"]),
        ((), {}, ["'toy'", "at least 1"]),
        ((0, 4), {}, ["[0, 4]", "0..3"]),
        ((-1, 0), {}, ["[-1, 0]", "0..3"]),
        ((1, 1), {}, ["[1, 1]", "different"]),
        ((0, 1), {"augment": "domainbet"}, ["'domainbet'", "did you mean 'domainbed'"]),
    ],
)
def test_refuses(data, refuses, domains, settings, parts):
    with refuses(*parts):
        batches(data, domains, **settings)


def test_refuses_an_empty_pooled_batch(data, refuses):
    with refuses("batch_size=0"):
        next(batches(data).pooled(0))


def test_any_splits_will_do(data):
    """Keys may be any part of a domain, in any order."""
    keys = np.array([7, 3, 5])
    splits = Splits(out=(keys,) * 4, in_=(keys,) * 4)
    sample = TrainingBatches(data, splits, [1, 2], batch_size=2, seed=0, device="cpu")
    seen = {key_of(data, 1, x) for t in range(20) for x in sample(t).x[:2]}
    assert seen == {3, 5, 7}


def test_digits_end_to_end():
    data = load("digits_rotated")
    batch = batches(data, (0, 1, 2, 3, 4), batch_size=16)(0)
    assert batch.x.shape == (80, 1, 16, 16)
    assert batch.by_domain(batch.y).shape == (5, 16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("augment", list(AUGMENTATIONS))
def test_no_batch_waits_for_the_device(data, augment):
    sample = batches(data, device="cuda", augment=augment)
    sample(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in range(BLOCK + 2):
            sample(t)
    finally:
        torch.cuda.set_sync_debug_mode("default")
