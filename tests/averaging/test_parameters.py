"""Names and kinds of the tensors in an average."""

from __future__ import annotations

import pytest
from torch import nn

from dgavg.averaging.parameters import named_tensors, plain_name


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("module.a.weight", "a.weight"),
        ("module.module._orig_mod.a", "a"),
        ("a._orig_mod.b", "a.b"),
        ("a.module.b", "a.module.b"),
        ("modules.a", "modules.a"),
    ],
)
def test_only_the_prefixes_of_wrappers_go(name, plain):
    assert plain_name(name) == plain


def test_tensors_by_name_alias_the_model():
    model = nn.BatchNorm1d(2)
    tensors = named_tensors(model)
    tensors["running_mean"].fill_(5.0)
    assert model.running_mean.tolist() == [5.0, 5.0]
    assert list(tensors) == list(model.state_dict())
