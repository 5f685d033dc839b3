"""A trial of a stack: whether it does to its models what is done to each alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dgavg.errors import UserError, require
from dgavg.models.stack import Stack, part
from dgavg.seeding import random_state, set_random_state
from dgavg.stacked import StackedRun

ROWS = 8  # images a model
ROUNDING = 3e-3  # of the largest number: 1e-4 was seen, of ResNet-50


def try_out(run: StackedRun, models: Sequence[nn.Module], shape: tuple[int, ...]) -> None:
    """Pass random images (C, H, W) through the stack and through `models`, those it is made of.

    Layers with a stacked form are known to be right; other forward code may keep what is in no
    parameter or buffer, put a new buffer in the place of one, or draw from a generator that
    `torch.vmap` does not know of. The trial leaves nothing behind.

    Raises `UserError` for forward code that can't be run for several models at once, or that then
    does something else.
    """
    stack = run.model
    assert isinstance(stack, Stack)
    if stack.layered:
        return
    before = [buffer.clone() for buffer in stack.buffers()]
    drawn = random_state(run.device)
    images = torch.rand(stack.count * ROWS, *shape, generator=torch.Generator().manual_seed(0))
    try:
        with run.autocast():
            logits = stack(images.to(run.device))
        logits.float().sum().backward()
        _restore(stack, before)
        same = _compare(copy.deepcopy(stack).cpu(), models, images)  # GPUs round to TF32
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = str(error).strip().splitlines()[0].partition(". ")[0]
        raise UserError(
            f"stack: the model's forward pass can't be taken for several at once ({reason}): "
            "write stack=1"
        ) from None
    finally:
        stack.zero_grad()
        _restore(stack, before)
        set_random_state(drawn, run.device)
    require(
        same,
        "stack: the model does not do the same for several at once as alone: it draws random "
        "numbers, or keeps what is no parameter and no buffer written in place: write stack=1",
    )


@torch.no_grad()
def _compare(stack: Stack, models: Sequence[nn.Module], images: Tensor) -> bool:
    """Whether the first and the last model alone give what they give in the stack."""
    found = stack(images).chunk(stack.count)
    after = {k: v.clone() for k, v in stack.named_buffers()}
    tested = stack.eval()(images).chunk(stack.count)
    own = images.chunk(stack.count)
    for r in (0, stack.count - 1):
        model = copy.deepcopy(models[r]).cpu().train()
        old = {k: v.clone() for k, v in model.named_buffers()}
        pairs = [(found[r], model(own[r]))]
        moved = part(after, r)
        pairs += [(moved[k] - old[k], v - old[k]) for k, v in model.named_buffers()]
        pairs.append((tested[r], model.eval()(own[r])))
        if not all(_alike(*pair) for pair in pairs):
            return False
    return True


def _alike(mine: Tensor, alone: Tensor) -> bool:
    close = ROUNDING * float(alone.abs().max()) + 1e-6 if alone.numel() else 0.0
    return torch.allclose(mine.float(), alone.float(), rtol=0, atol=close, equal_nan=True)


def _restore(stack: Stack, buffers: Sequence[Tensor]) -> None:
    for buffer, old in zip(stack.buffers(), buffers, strict=True):
        buffer.copy_(old)
