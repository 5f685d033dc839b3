import math

import pytest
import torch
import torchvision.transforms as tv
import torchvision.transforms.functional as tvf

from dgavg.data import augment
from dgavg.data.augment import AUGMENTATIONS, TRIES, crop_and_flip, crop_boxes, domainbed
from dgavg.data.domains import as_floats


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(n=6, channels=3, height=20, width=20, seed=1):
    """Smooth random images that use all of 0..1."""
    coarse = torch.rand(n, channels, 5, 5, generator=generator(seed))
    x = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    return (x - x.amin((1, 2, 3), True)) / (x.amax((1, 2, 3), True) - x.amin((1, 2, 3), True))


def test_none_changes_nothing():
    x = pictures()
    assert AUGMENTATIONS["none"](x, generator()) is x


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_shape_range_and_purity(channels):
    x = pictures(8, channels, 12, 18)
    before = x.clone()
    out = domainbed(x, generator(3))
    assert out.shape == x.shape
    assert out.dtype == torch.float32
    assert out.min() >= 0
    assert out.max() <= 1
    assert torch.equal(x, before)
    assert torch.equal(out, domainbed(x, generator(3)))
    assert not torch.equal(out, domainbed(x, generator(4)))


# Each operation against torchvision's, with the same parameters.


@pytest.mark.parametrize("shape", [(20, 20), (16, 24), (224, 224)])
def test_crop_and_flip_are_torchvisions(shape):
    height, width = shape
    x = pictures(4, 3, height, width)
    boxes = [
        (0, 0, height, width),
        (3, 1, height - 4, width - 3),
        (0, 2, height - 1, width - 2),
        (height // 8, width // 9, round(height * 0.84), round(width * 0.85)),
    ]
    flips = [False, True, False, True]
    columns = [torch.tensor(column, dtype=torch.float32) for column in zip(*boxes, strict=True)]
    mine = crop_and_flip(x, *columns, torch.tensor(flips))
    for image, box, flip, out in zip(x, boxes, flips, mine, strict=True):
        expected = tvf.resized_crop(image, *box, size=[height, width], antialias=False)
        expected = tvf.hflip(expected) if flip else expected
        # Positions are exact to 2⁻²⁴ of the width of the image.
        torch.testing.assert_close(out, expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(mine[0], x[0], atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("mine", "theirs", "factors"),
    [
        (augment.adjust_brightness_, tvf.adjust_brightness, [0.7, 0.9, 1.0, 1.1, 1.3, 1.25]),
        (augment.adjust_contrast_, tvf.adjust_contrast, [0.7, 0.9, 1.0, 1.1, 1.3, 1.25]),
        (augment.adjust_saturation_, tvf.adjust_saturation, [0.7, 0.9, 1.0, 1.1, 1.3, 1.25]),
        (augment.adjust_hue_, tvf.adjust_hue, [-1 / 3, -0.1, 0.0, 0.1, 1 / 3, 0.25]),
    ],
)
def test_colour_changes_are_torchvisions(mine, theirs, factors):
    x = pictures(6)
    x[0, :, :2] = 0.0  # black, white, grey and pure colours too
    x[1, :, :2] = 1.0
    x[2, :, :2] = 0.5
    x[3] = (x[3] > 0.5).float()
    out = mine(x.clone(), torch.tensor(factors))
    expected = torch.stack([theirs(image, f) for image, f in zip(x, factors, strict=True)])
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=0)


def test_luma_is_torchvisions():
    x = pictures()
    torch.testing.assert_close(augment.luma(x), tvf.rgb_to_grayscale(x))


# What is drawn.


def many_boxes(n=20000, height=100, width=100, seed=0):
    u = torch.rand(2 * TRIES + 2, n, generator=generator(seed))
    return crop_boxes(u[:TRIES], u[TRIES : 2 * TRIES], u[-2], u[-1], height, width)


def torchvision_boxes(n, height, width):
    image = torch.empty(3, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = [
            tv.RandomResizedCrop.get_params(image, (0.7, 1.0), (3 / 4, 4 / 3)) for _ in range(n)
        ]
    return torch.tensor(draws, dtype=torch.float32).T


@pytest.mark.parametrize(("height", "width"), [(100, 100), (32, 32), (60, 100), (100, 40)])
def test_crops_are_distributed_as_torchvisions(height, width):
    mine, theirs = many_boxes(20000, height, width), torchvision_boxes(3000, height, width)
    top, left, h, w = mine
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + h <= height).all()
    assert (left + w <= width).all()
    for a, b in zip((*mine, mine[2] * mine[3]), (*theirs, theirs[2] * theirs[3]), strict=True):
        at = torch.cat((a, b)).unique()
        cdf_a, cdf_b = (
            torch.searchsorted(v.sort().values, at, right=True) / len(v) for v in (a, b)
        )
        assert (cdf_a - cdf_b).abs().max() < 0.04  # Kolmogorov and Smirnov: 0.032 at 1 %


def test_crop_areas_and_ratios():
    _, _, h, w = many_boxes(height=1000, width=1000)
    area, ratio = h * w / 1e6, w / h
    assert 0.699 < area.min() < 0.705
    assert 0.98 < area.max() <= 1
    assert 0.749 < ratio.min() < 0.76
    assert 1.31 < ratio.max() < 1.334
    assert abs(ratio.log().mean()) < 0.01


def test_a_crop_that_never_fits_is_the_largest_allowed_in_the_centre():
    ones = torch.ones(TRIES, 2)
    half = torch.full((2,), 0.5)
    assert [v.tolist() for v in crop_boxes(ones, ones, half, half, 40, 100)] == (
        [[0.0] * 2, [23.0] * 2, [40.0] * 2, [53.0] * 2]
    )
    assert [v.tolist() for v in crop_boxes(ones, ones, half, half, 100, 40)] == (
        [[23.0] * 2, [0.0] * 2, [53.0] * 2, [40.0] * 2]
    )
    ratios = ones.clone()
    ratios[4:, 1] = 0.5  # from the fifth try on, a square fits
    areas = torch.full_like(ones, 0.5)
    top, left, h, w = crop_boxes(ones * 0 + areas, ratios, half, half, 100, 100)
    side = round(math.sqrt(8500))
    assert h[1] == w[1] == side
    assert top[1] == left[1] == (101 - side) // 2


def draws(name, monkeypatch, n=4000, seeds=10):
    """The factors that `domainbed` hands to one of its operations, for some batches."""
    seen, operation = [], getattr(augment, name)

    def record(x, factor):
        seen.append(factor)
        return operation(x, factor)

    monkeypatch.setattr(augment, name, record)
    x = torch.rand(n, 3, 2, 2, generator=generator())
    for seed in range(seeds):
        domainbed(x, generator(seed))
    return torch.cat(seen)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("adjust_brightness_", 0.7, 1.3),
        ("adjust_contrast_", 0.7, 1.3),
        ("adjust_saturation_", 0.7, 1.3),
        ("adjust_hue_", -0.3, 0.3),
    ],
)
def test_factors_are_uniform(monkeypatch, name, low, high):
    factors = draws(name, monkeypatch)
    expected = torch.linspace(low, high, 21)
    quantiles = factors.quantile(torch.linspace(0, 1, 21))
    assert (quantiles - expected).abs().max() < 0.012
    assert low <= factors.min() <= factors.max() <= high


def test_factors_are_independent(monkeypatch):
    names = ("adjust_brightness_", "adjust_contrast_", "adjust_saturation_", "adjust_hue_")
    factors = torch.stack([draws(name, monkeypatch) for name in names])
    off_diagonal = torch.corrcoef(factors) - torch.eye(4)
    assert off_diagonal.abs().max() < 0.03


def test_flip_rate_and_grayscale_rate():
    """Left half red, right half blue: the sides tell the flip, their colours the grayscale."""
    x = torch.zeros(4000, 3, 8, 8)
    x[:, 0, :, :4], x[:, 2, :, 4:] = 0.8, 0.8
    out = torch.cat([domainbed(x, generator(seed)) for seed in range(3)])
    corners = out[:, :, 4, [0, 7]]
    gray = (corners.amax(1) - corners.amin(1)).amax(1) == 0
    assert abs(gray.float().mean() - 0.1) < 0.012
    one_channel = torch.zeros(12000, 1, 8, 8)
    one_channel[..., :4] = 1
    flipped = domainbed(one_channel, generator())[:, 0, 4, 0] < 0.5
    assert abs(flipped.float().mean() - 0.5) < 0.02
    assert abs((flipped[1:] == flipped[:-1]).float().mean() - 0.5) < 0.02


def test_every_order_of_the_colour_changes_occurs(monkeypatch):
    orders, current = {}, []
    for name in ("adjust_brightness_", "adjust_contrast_", "adjust_saturation_", "adjust_hue_"):

        def record(x, factor, name=name):
            current.append(name)
            return x

        monkeypatch.setattr(augment, name, record)
    x = pictures(1)
    for seed in range(2400):
        current.clear()
        domainbed(x, generator(seed * 7919))
        assert len(set(current)) == 4
        orders[tuple(current)] = orders.get(tuple(current), 0) + 1
    assert len(orders) == 24
    assert min(orders.values()) > 50


def test_each_image_has_its_own_parameters():
    x = pictures(1).expand(64, -1, -1, -1)
    out = domainbed(x, generator())
    distances = torch.cdist(out.flatten(1), out.flatten(1)) + torch.eye(64)
    assert distances.min() > 1e-3


def test_an_image_does_not_depend_on_its_neighbours():
    x = pictures(6)
    y = x.clone()
    y[1:] = pictures(5, seed=9)
    torch.testing.assert_close(domainbed(x, generator())[0], domainbed(y, generator())[0])


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_other_channels_are_cropped_and_flipped_only(channels):
    flat = torch.full((50, channels, 6, 6), 0.25)
    torch.testing.assert_close(domainbed(flat, generator()), flat)


@pytest.mark.parametrize("channels", [1, 3])
def test_rounding_never_leaves_the_range(channels):
    assert domainbed(torch.ones(200, channels, 14, 14), generator()).max() == 1


def test_whole_pipeline_has_torchvisions_moments():
    """Means over many draws, against DomainBed's own list of transforms."""
    x = pictures(1, height=24, width=24)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = tv.Compose(
            [
                tv.RandomResizedCrop(24, scale=(0.7, 1.0), antialias=False),
                tv.RandomHorizontalFlip(),
                tv.ColorJitter(0.3, 0.3, 0.3, 0.3),
                tv.RandomGrayscale(),
            ]
        )
        theirs = torch.stack([pipeline(x[0]) for _ in range(800)])
    mine = torch.cat([domainbed(x.expand(40, -1, -1, -1), generator(s)) for s in range(100)])
    error = theirs.std(0) * (1 / 800 + 1 / 4000) ** 0.5
    assert ((mine.mean(0) - theirs.mean(0)).abs() / error).max() < 5
    assert ((mine.std(0) / theirs.std(0)) - 1).abs().mean() < 0.05


# How it is computed.


def bytes_of(n=7, height=20, width=20):
    return (pictures(n, height=height, width=width) * 255).round().to(torch.uint8)


def test_bytes_are_augmented_as_the_floats_they_stand_for():
    x = bytes_of()
    assert torch.equal(domainbed(x, generator()), domainbed(as_floats(x), generator()))
    assert torch.equal(AUGMENTATIONS["none"](x, generator()), as_floats(x))


@pytest.mark.parametrize("pixels", [1, 900, 10**9])
@pytest.mark.parametrize("large", [1, 10**9])
def test_how_many_at_once_makes_no_difference(monkeypatch, pixels, large):
    monkeypatch.setattr(augment, "LARGE", large)
    x = bytes_of()
    expected = [domainbed(x, generator(seed)) for seed in range(4)]
    monkeypatch.setattr(augment, "PIXELS", pixels)
    for seed in range(4):
        assert torch.equal(domainbed(x, generator(seed)), expected[seed])


@pytest.mark.parametrize("shape", [(20, 20), (16, 24)])
def test_large_images_are_cropped_as_small_ones_are(monkeypatch, shape):
    """And as a GPU crops all: by `grid_sample`, which runs here too."""
    height, width = shape
    x = pictures(40, 3, height, width)
    u = torch.rand(2 * TRIES + 3, 40, generator=generator())
    boxes = crop_boxes(u[:TRIES], u[TRIES : 2 * TRIES], *u[-3:-1], height, width)
    small = crop_and_flip(x, *boxes, u[-1] < 0.5)
    monkeypatch.setattr(augment, "LARGE", height * width)
    monkeypatch.setattr(augment, "_sample", None)
    large = crop_and_flip(x, *boxes, u[-1] < 0.5)
    torch.testing.assert_close(large, small, atol=2e-5, rtol=0)


def test_what_is_augmented_can_be_trained_on():
    x = domainbed(bytes_of(), generator()).requires_grad_()
    (x.square().sum()).backward()
    assert torch.equal(x.grad, 2 * x)
    assert not x.is_inference()
