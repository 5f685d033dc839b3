import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms
from torchvision.transforms.functional import rotate

from dgavg.data import load
from dgavg.data.digits import _luma
from dgavg.data.sources import mnist, npz, optdigits


def domainbed_shuffle(images, labels, seed):
    """The seed of the run, then DomainBed's first draw."""
    torch.manual_seed(seed)
    order = torch.randperm(len(images))
    return images[order], labels[order]


def domainbed_rotated(images, labels, angle):
    """DomainBed's RotatedMNIST.rotate_dataset."""
    turn = transforms.Compose(
        [
            transforms.ToPILImage(),
            transforms.Lambda(
                lambda x: rotate(
                    x, angle, fill=(0,), interpolation=transforms.InterpolationMode.BILINEAR
                )
            ),
            transforms.ToTensor(),
        ]
    )
    return torch.stack([turn(image) for image in images]), labels


def domainbed_coloured(images, labels, flips):
    """DomainBed's ColoredMNIST.color_dataset."""

    def bernoulli(p, size):
        return (torch.rand(size) < p).float()

    labels = (labels < 5).float()
    labels = (labels - bernoulli(0.25, len(labels))).abs()
    colours = (labels - bernoulli(flips, len(labels))).abs()
    images = torch.stack([images, images], dim=1)
    images[torch.arange(len(images)), (1 - colours).long(), :, :] *= 0
    return images.float().div_(255.0), labels.long()


@pytest.fixture
def own_rng():
    with torch.random.fork_rng():
        yield


@pytest.mark.usefixtures("own_rng")
@pytest.mark.parametrize("seed", [0, 3])
def test_rotated_mnist_is_domainbeds(small_mnist, seed):
    root, images, labels = small_mnist
    data = load("rotated_mnist", root=root, shuffle_seed=seed)
    assert data.names == ("0", "15", "30", "45", "60", "75")
    assert data.classes == tuple("0123456789")
    images, labels = domainbed_shuffle(torch.from_numpy(images), torch.from_numpy(labels), seed)
    for i, domain in enumerate(data.domains):
        x, y = domainbed_rotated(images[i::6], labels[i::6], 15 * i)
        assert torch.equal(domain.images / 255, x)
        assert domain.labels.tolist() == y.tolist()


@pytest.mark.usefixtures("own_rng")
@pytest.mark.parametrize("seed", [0, 3])
def test_colored_mnist_is_domainbeds(small_mnist, seed):
    root, images, labels = small_mnist
    data = load("colored_mnist", root=root, shuffle_seed=seed)
    assert data.names == ("+90%", "+80%", "-90%")
    assert data.input_shape == (2, 28, 28)
    assert len(data.classes) == 2
    images, labels = domainbed_shuffle(torch.from_numpy(images), torch.from_numpy(labels), seed)
    for i, flips in enumerate((0.1, 0.2, 0.9)):
        x, y = domainbed_coloured(images[i::3], labels[i::3], flips)
        assert torch.equal(data.domains[i].images / 255, x)
        assert data.domains[i].labels.tolist() == y.tolist()


@pytest.mark.parametrize("name", ["rotated_mnist", "colored_mnist"])
def test_limit_keeps_the_first_of_each_domain(small_mnist, name):
    whole, part = load(name, root=small_mnist[0]), load(name, root=small_mnist[0], limit=7)
    for one, other in zip(whole.domains, part.domains, strict=True):
        assert torch.equal(one.images[:7], other.images)
        assert torch.equal(one.labels[:7], other.labels)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("rotated_mnist", {}), ("colored_mnist", {}), ("digits_rotated", {"angles": [0, 90]})],
)
def test_the_global_random_state_is_neither_read_nor_changed(small_mnist, name, settings):
    if name != "digits_rotated":
        settings = {"root": small_mnist[0]}
    first, before = load(name, **settings), torch.random.get_rng_state()
    with torch.random.fork_rng():
        torch.manual_seed(17)
        second = load(name, **settings)
    assert torch.equal(torch.random.get_rng_state(), before)
    for one, other in zip(first.domains, second.domains, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


def test_digits_rotated_deals_every_digit_out_once():
    data = load("digits_rotated", size=8, angles=[0, 90, 180.0, -22.5])
    assert data.names == ("0", "90", "180", "-22.5")
    assert data.input_shape == (1, 8, 8)
    assert [len(domain) for domain in data.domains] == [450, 449, 449, 449]
    images, labels = optdigits()
    turned_back = [torch.rot90(data.domains[k].images, -k, (2, 3)) for k in range(3)]
    found = {(bytes(x.numpy()), int(y)) for x, y in zip(images, labels, strict=True)}
    seen = []
    for k, x in enumerate(turned_back):
        seen += [
            (bytes(image.contiguous().numpy()), int(label))
            for image, label in zip(x, data.domains[k].labels, strict=True)
        ]
    assert set(seen) <= found
    assert len(set(seen)) == 1348


def test_digits_rotated_default():
    data = load("digits_rotated")
    assert data.names == ("0", "15", "30", "45", "60", "75")
    assert data.input_shape == (1, 16, 16)
    assert sum(len(domain) for domain in data.domains) == 1797
    other = load("digits_rotated", shuffle_seed=1)
    assert not torch.equal(data.domains[0].images, other.domains[0].images)
    # Bilinear from 8×8, and turned as Pillow does.
    images, labels = optdigits()
    rng = torch.Generator().manual_seed(0)
    order = torch.randperm(1797, generator=rng)
    mine = data.domains[1].images[0, 0].numpy()
    large = F.interpolate(images[order[1:2]].double(), size=(16, 16), mode="bilinear").round()
    turned = Image.fromarray(large[0, 0].numpy().astype(np.uint8)).rotate(
        15, Image.Resampling.BILINEAR
    )
    assert np.abs(np.asarray(turned).astype(int) - mine).max() <= 2
    assert data.domains[1].labels[0] == labels[order[1]]


def test_bad_settings(small_mnist, refuses):
    with refuses("data.size=0"):
        load("digits_rotated", size=0)
    with refuses("data.limit=0", "null"):
        load("rotated_mnist", root=small_mnist[0], limit=0)
    with refuses("data.limit=-1"):
        load("colored_mnist", root=small_mnist[0], limit=-1)
    with refuses("data.channels=2"):
        load("digits", root=small_mnist[0], channels=2)
    with refuses("domain '15' twice"):
        load("digits_rotated", angles=[15, 15])
    with refuses("has 1 domain(s)"):
        load("digits_rotated", angles=[15])
    with refuses("data.angles has 91 angles for 90 images"):
        load("rotated_mnist", root=small_mnist[0], angles=list(range(91)))


@pytest.fixture
def four_sources(small_mnist):
    root = small_mnist[0]
    rng = np.random.default_rng(0)
    y = np.arange(40) % 10
    np.savez(root / "usps.npz", x=rng.integers(0, 256, (40, 16, 16), np.uint8), y=y)
    np.savez(root / "mnist_m.npz", x=rng.integers(0, 256, (40, 32, 32, 3), np.uint8), y=y)
    return str(root)


def shrunk(pixels):
    """28×28 by Pillow, whose bilinear is antialiased."""
    return np.asarray(Image.fromarray(pixels).resize((28, 28), Image.Resampling.BILINEAR))


def test_digits_of_four_sources(four_sources):
    data = load("digits", root=four_sources, shuffle_seed=2)
    assert data.names == ("mnist", "mnist_m", "usps", "optdigits")
    assert data.classes == tuple("0123456789")
    assert data.input_shape == (3, 28, 28)
    assert [len(domain) for domain in data.domains] == [90, 40, 40, 1797]
    sources = {
        "mnist": mnist(four_sources, False),
        "mnist_m": npz(four_sources, "mnist_m.npz", 32, 3),
        "usps": npz(four_sources, "usps.npz", 16, 1),
        "optdigits": optdigits(),
    }
    for domain in data.domains:
        images, labels = sources[domain.name]
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(2))
        assert domain.labels.tolist() == labels[order].tolist()
        for mine, source in zip(domain.images[:5], images[order[:5]], strict=True):
            pixels = source.permute(1, 2, 0).squeeze(-1).contiguous().numpy()
            expected = shrunk(pixels)
            if expected.ndim == 2:
                expected = np.stack([expected] * 3, axis=2)
            distance = mine.permute(1, 2, 0).numpy().astype(int) - expected
            assert np.abs(distance).max() <= 1


def test_digits_in_grey_and_limited(four_sources):
    data = load("digits", root=four_sources, channels=1, limit=30)
    colour = load("digits", root=four_sources, channels=3)
    assert data.input_shape == (1, 28, 28)
    assert [len(domain) for domain in data.domains] == [30] * 4
    for grey, rgb in zip(data.domains, colour.domains, strict=True):
        assert grey.labels.tolist() == rgb.labels[:30].tolist()
        if grey.name != "mnist_m":
            assert torch.equal(grey.images, rgb.images[:30, :1])
    source, _ = npz(four_sources, "mnist_m.npz", 32, 3)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    picture = Image.fromarray(source[order[0]].permute(1, 2, 0).contiguous().numpy()).convert("L")
    distance = data.domains[1].images[0, 0].numpy().astype(int) - shrunk(np.asarray(picture))
    assert np.abs(distance).max() <= 1


def test_luma_is_pillows():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(pixels).convert("L"))
    assert _luma(torch.from_numpy(pixels).movedim(-1, 0)[None])[0, 0].tolist() == expected.tolist()


def test_real_digits(real_data):
    data = load("digits", root=real_data, limit=1000)
    assert [len(domain) for domain in data.domains] == [1000] * 4
    for domain in data.domains:
        assert domain.labels.bincount().min() > 60
    # The class means of MNIST recognise the digits of each source better than chance.
    means = torch.stack([prototype(data.domains[0], k) for k in range(10)])
    for domain in data.domains:
        guess = (unit(domain.images) @ means.T).argmax(1)
        assert (guess == domain.labels).float().mean() > 0.25


def prototype(domain, digit):
    return F.normalize(unit(domain.images[domain.labels == digit]).mean(0), dim=0)


def unit(images):
    x = images.float().mean(1).flatten(1)
    return F.normalize(x - x.mean(1, keepdim=True), dim=1)


def test_real_mnist_has_its_known_counts(real_data):
    images, labels = mnist(str(real_data), download=False)
    assert images.shape == (70000, 1, 28, 28)
    assert labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert labels[60000:60005].tolist() == [7, 2, 1, 0, 4]
    assert labels.bincount().tolist() == [
        6903, 7877, 6990, 7141, 6824, 6313, 6876, 7293, 6825, 6958,
    ]  # fmt: skip


def test_real_colored_mnist_has_its_correlations(real_data):
    data = load("colored_mnist", root=real_data)
    assert [len(domain) for domain in data.domains] == [23334, 23333, 23333]
    for domain, agree in zip(data.domains, (0.9, 0.8, 0.1), strict=True):
        colour = (domain.images[:, 1].amax((1, 2)) > 0).long()
        assert not (domain.images.amax((2, 3)) > 0).all(1).any()
        assert abs((colour == domain.labels).float().mean() - agree) < 0.01
