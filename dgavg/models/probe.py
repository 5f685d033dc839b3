"""What a library's backbone makes of an image: found out by giving it one."""

from __future__ import annotations

from difflib import get_close_matches

import torch
from torch import nn

from dgavg.errors import UserError, require


def feature_width(net: nn.Module, what: str, input_shape: tuple[int, int, int]) -> int:
    """F, from one image of zeros; statistics, generators and modes stay as they were.

    Args:
        net: images (N, C, H, W) to features (N, F), in training mode.
        what: what an error calls it.

    Raises:
        UserError: it cannot take such images, or its features have another shape.
    """
    net.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            shape = net(torch.zeros(1, *input_shape)).shape
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        raise refusal(what, input_shape, error) from error
    finally:
        net.train()
    require(
        len(shape) == 2,
        f"{what} gives features of shape {tuple(shape)}, not (N, F); write one that pools them",
    )
    return int(shape[1])


def refusal(what: str, input_shape: tuple[int, int, int], error: Exception) -> UserError:
    """The error for a backbone that can't be built for such images, with the library's reason."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return UserError(
        f"{what} cannot be built for images of shape {tuple(input_shape)}: {reason}; write another "
        "backbone or data.size"
    )


def no_backbone(library: str, name: str, known: list[str], listing: str) -> UserError:
    """The error for a name that a library doesn't have: its lists are too long to print."""
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return UserError(f"{library} has no backbone {name!r}; {hint}{listing} has them all")
