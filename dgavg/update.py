"""Update: from a loss to gradients in plain units, and from those to the optimizer's step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dgavg.buckets import mean_gradients
from dgavg.distributed import ranks
from dgavg.errors import UserError
from dgavg.gather import mean

FIRST_SCALE, INTERVAL = 2.0**16, 2000  # of torch.amp.GradScaler
LAST_SCALE = 2.0**-24  # no gradient overflows here unless it is infinite by itself


class Update:
    """What stands below every gradient link: loss scaling, processes, clipping, the optimizer.

    `scaled`: losses are multiplied before the backward pass so that float16 does not underflow,
    and gradients divided at once, so no link ever sees a scaled one. An update with a gradient that
    is not finite is skipped, and the scale halved; it doubles after 2,000 updates without one
    (Micikevicius et al. 2018, arXiv 1710.03740). Where several processes train together
    (`torch.distributed`), each gradient is the mean of theirs, sent during the backward pass
    (`dgavg.buckets`); the model needs no wrapper, and all processes must reach the same parameters.
    `clip` is the largest norm that all gradients of an update may have together.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        *,
        scaled: bool = False,
        clip: float | None = None,
    ) -> None:
        self.parameters, self.optimizer, self.clip = list(parameters), optimizer, clip
        self.scale = FIRST_SCALE if scaled else None
        self.good = 0  # updates since the scale last changed
        self.before_step: list[Callable[[], None]] = []  # called before gradients are clipped

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` to `.grad`."""
        if self.scale is None and ranks() == 1:
            loss.backward()  # type: ignore[no-untyped-call]
            return
        for parameter, gradient in zip(self.parameters, self.gradients(loss), strict=True):
            if gradient is not None and parameter.grad is not None:
                parameter.grad += gradient
            elif gradient is not None:
                parameter.grad = gradient

    def gradients(
        self, loss: Tensor, *, retain: bool = False, create_graph: bool = False
    ) -> list[Tensor | None]:
        """The gradients of `loss` in each parameter, or None where it has none.

        Read them only: two may be one tensor. `retain` keeps the graph for another call.
        `create_graph` gives gradients that can be differentiated again.
        """
        wanted = [p for p in self.parameters if p.requires_grad]
        scaled = loss if self.scale is None else loss * self.scale
        found: Sequence[Tensor | None]
        if ranks() > 1 and not create_graph:
            found = mean_gradients(scaled, wanted, retain=retain)
        else:
            found = torch.autograd.grad(
                scaled,
                wanted,
                retain_graph=retain or create_graph,
                create_graph=create_graph,
                allow_unused=True,
            )
        there = {p: g for p, g in zip(wanted, found, strict=True) if g is not None}
        plain = list(there.values())
        if self.scale is not None and plain:
            # new tensors: two gradients may be one, or one small tensor seen as a large one
            plain = list(torch._foreach_div(plain, self.scale))
        if create_graph:
            plain = averaged(plain)
        there = dict(zip(there, plain, strict=True))
        return [there.get(p) for p in self.parameters]

    def step(self) -> None:
        """Let the optimizer step with what is in `.grad`.

        Raises `UserError` where gradients stay infinite however small the loss is scaled.
        """
        for prepare in self.before_step:
            prepare()
        self._lay_out()
        there = [p.grad for p in self.parameters if p.grad is not None]
        if self.scale is not None and not self._finite(there):
            return
        if self.clip is not None and there:
            nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()

    def _lay_out(self) -> None:
        """Make gradients lie in memory as their weights do; those that links compute may not.

        On a CPU a fused optimizer walks through both side by side, whatever their strides: it would
        silently give the numbers of such a gradient to other weights.
        """
        for p in self.parameters:
            if p.grad is not None and p.grad.stride() != p.stride():
                p.grad = torch.empty_like(p).copy_(p.grad)

    def _finite(self, gradients: list[Tensor]) -> bool:
        """Whether the update counts; moves the scale."""
        assert self.scale is not None
        norms = torch._foreach_norm(gradients, float("inf")) if gradients else [torch.zeros(())]
        finite = bool(torch.stack(list(norms)).isfinite().all())
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.scale /= 2
        elif self.good == INTERVAL:
            self.scale, self.good = self.scale * 2, 0
        if self.scale < LAST_SCALE:
            raise UserError(
                "gradients are not finite, however small the loss is scaled: "
                "try precision=bf16 or fp32, or a lower optimizer.lr"
            )
        return finite

    def state_dict(self) -> dict[str, Any]:
        """The scale and how long it has been good."""
        return {"scale": self.scale, "good": self.good}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises `ValueError` where one of the two runs scales its losses and the other does not.
        """
        if (saved["scale"] is None) != (self.scale is None):
            raise ValueError("one is of precision fp16, the other is not")
        self.scale, self.good = saved["scale"], saved["good"]


def averaged(tensors: list[Tensor]) -> list[Tensor]:
    """The means over all processes, with their slopes: one message a dtype and device.

    Where one process trains alone, the tensors themselves.
    """
    if ranks() == 1:
        return tensors
    kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for i, tensor in enumerate(tensors):
        kinds.setdefault((tensor.dtype, tensor.device), []).append(i)
    means = list(tensors)
    for same in kinds.values():
        flat = mean(torch.cat([tensors[i].flatten() for i in same]))
        parts = torch.split(flat, [tensors[i].numel() for i in same])
        for i, part in zip(same, parts, strict=True):
            means[i] = part.view(tensors[i].shape)
    return means
