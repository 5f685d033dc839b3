"""Pretrained weights: read a file without running its code, check all of it, then copy it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dgavg.errors import UserError, require
from dgavg.models.model import Model, backbone_of

HEADS = ("fc.", "classifier.", "head.", "heads.", "head_dist.", "last_linear.")
"""Where libraries keep the ImageNet classifier; ours has other classes, so theirs is left out."""

DOMAINBED = "model_dict"
NESTED = ("state_dict", "model", DOMAINBED)
"""The keys under which training scripts save a state dict beside other things."""


def load_weights(
    model_part: nn.Module, path: str | Path, first_conv: str | Collection[str] = ()
) -> None:
    """Copy a weights file into a model, all of it or nothing.

    Args:
        model_part: a `Model`, its featurizer, or a bare backbone; written in place, so whatever
            shares its tensors sees the weights too.
        path: safetensors, or a state dict saved by torch (also one under "state_dict" or "model",
            and DomainBed's `model.pkl`: its featurizer and classifier). Its names are a library's,
            or those of a whole `Model` (`featurizer.*`, `classifier.*`). Leading `module.` and
            `_orig_mod.` are dropped.
        first_conv: the layers that read the image. Where theirs takes three channels and ours C,
            each of ours gets the mean over the three times 3 / C: an image with equal channels
            gives what the same grey RGB image gives.

    A library's own classifier is left out. `num_batches_tracked` may be missing, as in old files.

    Raises:
        UserError: the file is not there, is truncated, holds code or no weights, or has missing,
            unexpected or wrongly shaped tensors, or numbers that are not finite.
    """
    fit_weights(model_part, read_weights(path), str(path), first_conv)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a weights file, on the CPU, by name; nothing in the file is ever executed.

    Raises:
        UserError: the file is not there, is truncated, holds code, or holds no weights.
    """
    file = Path(path).expanduser()
    require(
        file.is_file(),
        f"no weights file {str(path)!r}; write the path of a safetensors file or of a torch state "
        "dict, 'default' for the library's own weights, or null for none",
    )
    try:
        content = _read(file)
    except Exception as error:
        raise UserError(
            f"cannot read the weights file {path}: {_reason(error)}; write the path of an intact "
            "safetensors file or of a state dict saved with torch.save"
        ) from error
    for key in NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            content = _from_domainbed(content) if key == DOMAINBED else content
    require(
        isinstance(content, Mapping)
        and len(content) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()),
        f"the weights file {path} holds no state dict (names with tensors), at its top or under "
        f"{' or '.join(map(repr, NESTED))}; save model.state_dict() to it",
    )
    plain = {_plain(name): tensor for name, tensor in content.items()}
    require(
        len(plain) == len(content),
        f"the weights file {path} has names that differ only in 'module.' or '_orig_mod.'; "
        "save one of the two models to it",
    )
    return plain


def fit_weights(
    model_part: nn.Module,
    state: Mapping[str, Tensor],
    source: str,
    first_conv: str | Collection[str] = (),
) -> None:
    """Copy the tensors of `state` into a model, all or nothing; `load_weights` after the reading.

    Args:
        source: where `state` comes from, for the error.

    Raises:
        UserError: missing, unexpected or wrongly shaped tensors, or numbers that are not finite;
            the first of each are named.
    """
    target, state = _counterparts(model_part, state, first_conv)
    missing = [n for n in target if n not in state and not n.endswith("num_batches_tracked")]
    unexpected = [n for n in state if n not in target]
    reshaped = [
        f"{n} {_shape(state[n])} for {_shape(target[n])}"
        for n in target
        if n in state and state[n].shape != target[n].shape
    ]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    broken = [n for n, t in state.items() if t.is_floating_point() and not t.isfinite().all()]
    found["with numbers that are not finite"] = broken
    problems = [f"{len(n)} {kind} ({_first(n)})" for kind, n in found.items() if n]
    if problems:
        raise UserError(
            f"the weights {source} do not fit this model: {', '.join(problems)}; nothing was "
            "loaded; write the model that these weights were made for, or other weights"
        )
    with torch.no_grad():
        for name, tensor in state.items():
            target[name].copy_(tensor)


def download(get: Callable[[], Any], what: str) -> Any:
    """`get()`, with any failure of a library's own download as one `UserError`."""
    try:
        return get()
    except Exception as error:
        raise UserError(
            f"could not get the pretrained weights {what}: {_reason(error)}; write "
            "model.weights=<path of a file> or model.weights=null"
        ) from error


def _read(file: Path) -> Any:
    with file.open("rb") as stream:
        start = stream.read(9)
    if file.suffix == ".safetensors" or start[8:] == b"{":  # a length of 8 bytes, then JSON
        from safetensors.torch import load_file

        return load_file(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an odd pickle protocol, before the error about it
        with torch.serialization.safe_globals(_numbers()):
            return torch.load(file, map_location="cpu", weights_only=True)


def _numbers() -> list[Any]:
    """What NumPy's numbers are pickled by, under its names of now and before 2.0.

    Scripts save the settings of a run beside its weights, and those may be such numbers.
    """
    scalar = np.float64(0).__reduce__()[0]
    kinds = [type(np.dtype(kind)) for kind in "?bhilBHILefd"]
    names = [f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")]
    return [np.dtype, *kinds, *((scalar, name) for name in names)]


def _from_domainbed(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """Featurizer and classifier of a DomainBed algorithm, under the names of a `Model`.

    It saves them twice, the second time as `network.*`, and beside them what an algorithm trains.
    """
    theirs, ours = "featurizer.network.", "featurizer.backbone."
    return {
        ours + name.removeprefix(theirs) if name.startswith(theirs) else name: tensor
        for name, tensor in state.items()
        if isinstance(name, str) and name.startswith(("featurizer.", "classifier."))
    }


def _counterparts(
    part: nn.Module, state: Mapping[str, Tensor], first_conv: str | Collection[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What is to be written and what with, under the same names."""
    if any(name.startswith("featurizer.") for name in state):
        if isinstance(part, Model):
            return part.state_dict(), dict(state)
        heads: tuple[str, ...] = ("classifier.",)
        state = {_bare(name): tensor for name, tensor in state.items()}
    else:
        heads = HEADS
    target = backbone_of(part.featurizer if isinstance(part, Model) else part).state_dict()
    state = {n: t for n, t in state.items() if n in target or not n.startswith(heads)}
    for conv in (first_conv,) if isinstance(first_conv, str) else first_conv:
        name = f"{conv}.weight"
        if name in state and name in target:
            state[name] = _spread(state[name], target[name].shape)
    return target, state


def _spread(weight: Tensor, shape: torch.Size) -> Tensor:
    """(out, 3, h, w) made (out, C, h, w) for a `shape` with C other than 3; else as it is."""
    if weight.ndim != 4 or weight.shape[1] != 3 or len(shape) != 4 or shape[1] == 3:
        return weight
    return weight.float().mean(1, keepdim=True).mul(3 / shape[1]).expand(-1, shape[1], -1, -1)


def _plain(name: str) -> str:
    name = name.replace("_orig_mod.", "")
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def _bare(name: str) -> str:
    """A `Model`'s name as its backbone calls it."""
    return name.removeprefix("featurizer.").removeprefix("backbone.")


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "scalar"


def _first(names: Collection[str], shown: int = 3) -> str:
    rest = len(names) - shown
    return ", ".join(list(names)[:shown]) + (f" and {rest} more" if rest > 0 else "")


def _reason(error: BaseException) -> str:
    """The first line of an error, or its kind where it says nothing or gives torch's lecture."""
    lines: Iterable[str] = str(error).strip().splitlines()
    first = next(iter(lines), "").strip()
    if first.startswith("Weights only load failed"):
        return "it is no weights file, or it holds pickled code, which is never run"
    return first.rstrip(".") or type(error).__name__
