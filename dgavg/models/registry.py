"""Models by name: the registry, and building one from a name and its settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from dgavg.errors import UserError, require, unknown
from dgavg.models.model import Model
from dgavg.settings import check_settings, fits

Builder = TypeVar("Builder", bound=Callable[..., Model])

MODELS: dict[str, Callable[..., Model]] = {}
"""Builders by name: `builder(input_shape, classes, *, **settings) -> Model`."""


def model(name: str) -> Callable[[Builder], Builder]:
    """Register a builder under `name`.

    A builder takes the input shape (C, H, W) and the number of classes, then its settings as typed
    keywords with defaults. The first line of its docstring is its entry in `dgavg list models`.

    Raises:
        UserError: the name is taken.
    """

    def register(builder: Builder) -> Builder:
        require(name not in MODELS, f"model {name!r} is there already; register under another name")
        MODELS[name] = builder
        return builder

    return register


def build_model(
    name: str, input_shape: tuple[int, int, int], classes: int, **settings: Any
) -> Model:
    """A new model, on the CPU and in training mode, drawn from torch's global generator.

    Args:
        name: a key of `MODELS`.
        input_shape: channels, height and width of an image.
        classes: the number of logits.
        settings: the builder's keywords.

    Raises:
        UserError: an unknown model or setting, a setting left out or of the wrong type, sizes that
            are no positive integers, and what the builder itself refuses.
    """
    if name not in MODELS:
        raise unknown("model", name, MODELS)
    builder = MODELS[name]
    sizes = (*input_shape, classes) if isinstance(input_shape, Sequence) else ()
    require(
        len(sizes) == 4 and all(fits(n, int) and n > 0 for n in sizes),
        f"model {name} cannot be built for input shape {input_shape} and {classes} classes; "
        "give channels, height, width and classes as positive integers",
    )
    try:
        check_settings(builder, settings, "model")
    except UserError as error:
        raise UserError(f"model {name}: {error}") from None
    return builder(tuple(input_shape), classes, **settings)
