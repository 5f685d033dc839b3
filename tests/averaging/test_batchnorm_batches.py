"""How batches reach the model that is recalibrated."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from dgavg.averaging.batchnorm import batchnorm_recalibration, recalibrate_batchnorm

X = torch.arange(12.0).reshape(6, 2)
Y = torch.arange(6)


class Named(nn.Module):
    """A model with several inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, image, mask=None, *, scale=1.0):
        return self.norm(image * scale if mask is None else image[mask])


class Anything(Named):
    def forward(self, **inputs):
        self.got = set(inputs)
        return self.norm(inputs["image"])


class Records(nn.Module):
    """Tells what it got; its parameters are on another device than the batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, device="meta"))
        self.norm = nn.BatchNorm1d(2)

    def forward(self, batch):
        self.got = batch
        return self.norm(X)


def mean_of(model):
    return next(m for m in model.modules() if isinstance(m, nn.BatchNorm1d)).running_mean


BATCHES = {
    "a tensor": X,
    "a list": [X, Y],
    "a tuple": (X, Y, "names"),
    "a named tuple": namedtuple("Row", "x y")(X, Y),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_the_input_is_the_batch_or_its_first_element(kind):
    model = nn.Sequential(nn.BatchNorm1d(2))
    recalibrate_batchnorm(model, [BATCHES[kind]])
    torch.testing.assert_close(mean_of(model), X.mean(dim=0))


def parallel(model):
    return nn.DataParallel(model)


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [lambda model: model, parallel, compiled])
def test_a_mapping_is_passed_by_name_without_what_the_model_does_not_take(wrap):
    model = wrap(Named())
    recalibrate_batchnorm(model, [{"image": X, "label": Y, "scale": 10.0}])
    torch.testing.assert_close(mean_of(model), 10 * X.mean(dim=0))
    recalibrate_batchnorm(model, [{"mask": Y < 4, "image": X}])
    torch.testing.assert_close(mean_of(model), X[:4].mean(dim=0))
    recalibrate_batchnorm(model, [[{"image": X}, Y]])
    torch.testing.assert_close(mean_of(model), X.mean(dim=0))


def test_a_model_that_takes_any_name_gets_all():
    model = Anything()
    recalibrate_batchnorm(model, [{"image": X, "label": Y}])
    assert model.got == {"image", "label"}
    torch.testing.assert_close(mean_of(model), X.mean(dim=0))


def test_a_model_with_a_part_named_module_is_no_wrapper():
    class Has(Named):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)

    model = Has()
    recalibrate_batchnorm(model, [{"image": X}])
    torch.testing.assert_close(mean_of(model), X.mean(dim=0))


@pytest.mark.parametrize(
    ("batch", "names"),
    [({"images": X, "label": Y}, "images, label"), ({"mask": Y}, "mask"), ({"scale": 2}, "scale")],
)
def test_a_mapping_that_does_not_name_the_inputs_is_refused(batch, names):
    model = Named()
    message = (
        rf"^a batch has {names}, the model's forward takes image, mask, scale: "
        r"pass forward=lambda model, batch: model\(\.\.\.\)$"
    )
    with pytest.raises(ValueError, match=message):
        recalibrate_batchnorm(model, [batch])
    assert model.training
    assert mean_of(model).tolist() == [0.0, 0.0]


def test_a_mapping_with_nothing_that_an_optional_input_takes_is_refused():
    class Optional(Named):
        def forward(self, image=None):
            return image

    with pytest.raises(ValueError, match=r"^a batch has images, the model's forward takes image"):
        recalibrate_batchnorm(Optional(), [{"images": X}])


def test_tensors_go_to_the_device_of_the_model_wherever_they_are():
    model = Records()
    pair = namedtuple("Pair", "a b")
    batch = {"batch": [X, (Y, {"deep": X}), pair(X, 3)], "rest": X}
    recalibrate_batchnorm(model, [batch])
    first, (second, deep), both = model.got
    assert {t.device.type for t in (first, second, deep["deep"], both.a)} == {"meta"}
    assert both.b == 3
    recalibrate_batchnorm(model, [X])
    assert model.got.is_meta


def test_a_batch_of_another_package_is_moved_as_it_knows():
    class Graph:
        device = None

        def to(self, device):
            self.device = device
            return self

    model = Records()
    recalibrate_batchnorm(model, [Graph()])
    assert model.got.device == torch.device("meta")
    packed = pack_padded_sequence(X[None], [6], batch_first=True)
    recalibrate_batchnorm(model, [packed])
    assert isinstance(model.got, PackedSequence)
    assert model.got.data.is_meta


def drawn(batches, counter):
    for batch in batches:
        counter.append(len(batch))
        yield batch


@pytest.mark.parametrize(("cap", "expected"), [(None, 3), (1, 1), (2, 2), (3, 3), (9, 3)])
def test_at_most_so_many_batches_are_drawn(cap, expected):
    model, counter = nn.Sequential(nn.BatchNorm1d(2)), []
    recalibrate_batchnorm(model, drawn(X.split(2), counter), max_batches=cap)
    assert len(counter) == expected
    torch.testing.assert_close(mean_of(model), X[: 2 * expected].mean(dim=0))


@pytest.mark.parametrize("cap", [0, -1])
def test_a_cap_of_no_batches_is_refused(cap):
    with pytest.raises(ValueError, match=rf"^max_batches={cap}: at least 1, or None for all$"):
        recalibrate_batchnorm(nn.BatchNorm1d(2), [X], max_batches=cap)


def test_a_model_with_nothing_to_recalibrate_draws_no_batch():
    counter = []
    recalibrate_batchnorm(nn.Linear(2, 2), drawn([X], counter))
    recalibrate_batchnorm(nn.BatchNorm1d(2, track_running_stats=False), drawn([X], counter))
    assert counter == []


def test_an_iterator_that_is_exhausted_is_refused():
    layer, batches = nn.BatchNorm1d(2), iter([X])
    recalibrate_batchnorm(layer, batches)
    with pytest.raises(ValueError, match="no batch came"):
        recalibrate_batchnorm(layer, batches)
    torch.testing.assert_close(layer.running_mean, X.mean(dim=0))


def test_one_s_own_forward_gets_the_batch_untouched():
    seen = []

    def forward(model, batch):
        seen.append((model, batch))
        model(batch[1])

    layer, batch = nn.BatchNorm1d(2), (Y, X)
    recalibrate_batchnorm(layer, [batch], forward=forward)
    assert seen == [(layer, batch)]
    torch.testing.assert_close(layer.running_mean, X.mean(dim=0))


def test_the_block_runs_nothing_by_itself():
    layer = nn.BatchNorm1d(2)
    with batchnorm_recalibration(layer):
        layer(X[:3])
        layer(X[3:])
    torch.testing.assert_close(layer.running_mean, X.mean(dim=0))
