"""Layout: where tensors stand in one vector, and live ones read into it chunk by chunk."""

from __future__ import annotations

import pytest
import torch

from dgavg.averaging.vector import Layout


def tensors():
    random = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (), (2, 3, 5, 5), (0, 2), (7,), (40,)]
    found = [torch.randn(shape, generator=random) for shape in shapes]
    found[2] = found[2].to(memory_format=torch.channels_last)
    return [*found, torch.randn(6, 6, generator=random)[:, ::2]]


def test_views_are_the_tensors_in_their_own_order_of_axes():
    live = tensors()
    layout = Layout(live)
    assert layout.size == sum(t.numel() for t in live)
    flat = torch.zeros(5 + 2 * layout.size)[5:].view(2, layout.size)  # rows, not at the beginning
    for rows, t in zip(layout.views(flat), live, strict=True):
        rows[1].copy_(t)
    assert flat[0].eq(0).all()
    for view, t in zip(layout.views(flat[1]), live, strict=True):
        assert view.equal(t)
    assert layout.views(flat[1])[2].stride() == live[2].stride()
    in_memory = [t.as_strided((t.numel(),), (1,)) for t in live[:-1]]
    assert flat[1].equal(torch.cat([*in_memory, live[-1].flatten()]))


@pytest.mark.parametrize(
    ("length", "sizes"),
    [
        (1000, [228]),
        (40, [13, 40, 40, 40, 37, 40, 18]),
        (150, [13, 150, 65]),
        (10, [10, 3, *[10] * 15, 7, *[10] * 4, 18]),  # gaps: 18 numbers stay whole
    ],
)
def test_chunks_fill_the_vector_in_order_and_are_no_longer_than_asked(length, sizes):
    live = tensors()
    layout, chunks = Layout(live), Layout(live).chunks(live, length)
    assert [c.stop - c.start for c in chunks] == sizes
    assert [c.start for c in chunks] == [sum(sizes[:i]) for i in range(len(sizes))]
    flat = torch.zeros(1 + layout.size)[1:]
    for chunk in chunks:
        for place, part in zip(
            chunk.places(flat[chunk.start : chunk.stop]), chunk.parts, strict=True
        ):
            place.copy_(part)
    assert all(v.equal(t) for v, t in zip(layout.views(flat), live, strict=True))


def test_nothing_makes_no_chunks():
    assert Layout([]).chunks([], 10) == []
    assert Layout([]).views(torch.zeros(0)) == []


def test_a_chunk_may_be_just_full_and_a_first_tensor_with_gaps_too_long():
    gaps, half = torch.randn(6, 6)[:, ::2], torch.zeros(20)
    live = [gaps, half, half.clone()]
    chunks = Layout(live).chunks(live, 40)
    assert [(c.start, c.stop) for c in chunks] == [(0, 38), (38, 58)]
    assert [(c.start, c.stop) for c in Layout(live[1:]).chunks(live[1:], 40)] == [(0, 40)]
    assert [(c.start, c.stop) for c in Layout([gaps]).chunks([gaps], 10)] == [(0, 18)]
