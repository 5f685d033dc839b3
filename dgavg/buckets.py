"""Buckets: gradients that go to all processes while the backward pass still takes others.

The pass gives those of the last layers first. As soon as a bucket of them is whole it is sent, in
one message, as in torch's `DistributedDataParallel` (Li et al. 2020, arXiv 2006.15704). The hooks
that see to it live for one pass, and work for gradients that never go to `.grad`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dgavg.distributed import ranks

SIZE = 4 << 20  # bytes that fill a bucket: few messages, and little left to send after the pass


def mean_gradients(
    loss: Tensor, parameters: Sequence[nn.Parameter], *, retain: bool = False
) -> list[Tensor | None]:
    """The mean over processes of the gradients of `loss`, one a parameter; None where it has none.

    New tensors, laid out in memory as their parameters are. All processes must reach the same
    parameters. `retain` keeps the graph for another call.

    Buckets leave in the order of `split`, whichever is whole first. The graphs being alike, all
    processes walk them alike, so messages of the pass itself (`dgavg.gather`) stand at the same
    place among the buckets everywhere. A bucket that lacks a gradient waits for the end of the
    pass, and with it all after it.
    """
    buckets = [Bucket(some) for some in split(parameters)]
    waiting = deque(buckets)

    def take(bucket: Bucket, parameter: nn.Parameter, gradient: Tensor | None) -> None:
        if gradient is None:  # as a function of one's own may give
            return
        bucket.own[parameter] = gradient
        while waiting and waiting[0].whole():
            waiting.popleft().send()

    hooks = [
        p.register_hook(partial(take, bucket, p))  # type: ignore[no-untyped-call]
        for bucket in buckets
        for p in bucket.parameters
    ]
    try:
        # dividing one number is cheaper than dividing all gradients
        torch.autograd.grad(loss / ranks(), parameters, retain_graph=retain, allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    for bucket in waiting:
        bucket.send()
    means = {p: mean for bucket in buckets for p, mean in bucket.received().items()}
    return [means.get(p) for p in parameters]


def split(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The parameters from the last to the first; each part is of one dtype and device.

    A part ends with the parameter that fills `SIZE`.
    """
    parts: list[list[nn.Parameter]] = []
    kind, size = None, 0
    for p in reversed(parameters):
        if kind != (p.dtype, p.device) or size >= SIZE:
            parts.append([])
            kind, size = (p.dtype, p.device), 0
        parts[-1].append(p)
        size += p.numel() * p.element_size()
    return parts


class Bucket:
    """What one pass finds for some parameters, and the message of it."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self.own: dict[nn.Parameter, Tensor] = {}  # this process's gradients
        self.summed: dict[nn.Parameter, Tensor] = {}
        self.message: dist.Work | None = None

    def whole(self) -> bool:
        """Whether all gradients are there."""
        return len(self.own) == len(self.parameters)

    def send(self) -> None:
        """Start the message, of the gradients that are there; no message of none."""
        there = [p for p in self.parameters if p in self.own]
        if not there:
            return
        flat = there[0].new_empty(sum(p.numel() for p in there))
        parts = torch.split(flat, [p.numel() for p in there])
        for p, part in zip(there, parts, strict=True):
            strides = torch.empty_like(p, device="meta").stride()
            self.summed[p] = part.as_strided(p.shape, strides)
        torch._foreach_copy_(list(self.summed.values()), [self.own[p] for p in there])
        self.message = dist.all_reduce(flat, async_op=True)

    def received(self) -> dict[nn.Parameter, Tensor]:
        """The sums over processes, once they are there."""
        if self.message is not None:
            self.message.wait()
        return self.summed
