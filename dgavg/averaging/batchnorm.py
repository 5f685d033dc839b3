"""Batch-norm recalibration: running statistics that fit the weights they are used with."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import chain, islice
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from dgavg.averaging.moments import Moments, merge_ranks, ranks


def batchnorm_layers(model: nn.Module) -> list[_BatchNorm]:
    """The batch-norm layers of `model` that keep running statistics."""
    return [m for m in statistics_layers(model) if isinstance(m, _BatchNorm)]


def statistics_layers(model: nn.Module) -> list[_NormBase]:
    """The batch-norm and instance-norm layers of `model` that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _NormBase) and m.running_mean is not None]


@contextmanager
def batchnorm_recalibration(
    model: nn.Module, layers: Sequence[_NormBase] | None = None, *, reduce: bool = True
) -> Iterator[None]:
    """Forward passes in this block give `model` its batch-norm statistics anew.

    Inside, only the `layers` (by default all that keep running statistics, instance norm too, but
    frozen ones) normalise by the batch, as in training; everything else is in evaluation mode: no
    dropout, no power iteration of spectral norm. Frozen are, in a model in training mode, the
    layers that are not; in evaluation mode the layers whose weights need no gradient where other
    weights of the model do: name the `layers` where that can't tell. No gradients are kept, and
    what `torch.compile` made runs uncompiled. On leaving, the layers' running statistics are the
    exact moments over all rows they saw (of instance norm: the means over all samples), and every
    mode is as it was; `momentum` and `num_batches_tracked` are never touched. Feed it batches that
    mix all domains: deeper layers see inputs normalised by the batch.

    Under `torch.distributed` the moments are those of the rows of all ranks, unless `reduce` is
    false. Every rank must come here, with as many batches as it has, be it none. In the block there
    is no communication: each rank normalises by its own batches, `SyncBatchNorm` too (on any
    device), and `DistributedDataParallel` leaves the buffers alone.

    Raises `ValueError` where no batch came, and for a layer without running statistics or whose
    size is not known yet; after that, or any exception, the statistics are as before.
    """
    chosen = _chosen(model) if layers is None else list(layers)
    _check(model, chosen)
    moments = {layer: Moments(layer) for layer in chosen}
    with ExitStack() as stack:
        for layer, part in moments.items():
            hook = layer.register_forward_pre_hook(part.take, with_kwargs=True)
            stack.callback(hook.remove)
        stack.enter_context(_attributes(_settings(model, chosen)))
        stack.enter_context(_uncompiled())
        stack.enter_context(torch.no_grad())
        yield
    found = list(moments.values())
    if not found:
        return
    if reduce and ranks() > 1:
        merge_ranks(found)
    if not any(part.n for part in found):
        raise ValueError("batch norm was to be recalibrated, but no batch came")
    with torch.no_grad():
        for part in found:
            part.write()


def recalibrate_batchnorm(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    max_batches: int | None = None,
    layers: Sequence[_NormBase] | None = None,
    reduce: bool = True,
) -> None:
    """Give `model` exact batch-norm statistics over `batches`; see `batchnorm_recalibration`.

    `forward(model, batch)` passes a batch on. By default that is the model's input or, in a list or
    tuple, the first element is; a mapping is passed by name, without the entries that the model's
    `forward` doesn't take, such as labels. Tensors are moved to the model's device. Of the batches
    at most `max_batches` are drawn, and none by a model that has nothing to recalibrate.

    Raises `ValueError` as `batchnorm_recalibration` does, for `max_batches` below 1, and for a
    mapping that does not name the model's inputs.
    """
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches={max_batches}: at least 1, or None for all")
    layers = _chosen(model) if layers is None else layers
    if not layers:
        return
    with batchnorm_recalibration(model, layers, reduce=reduce):
        for batch in islice(batches, max_batches):
            (forward or pass_on)(model, batch)


def _chosen(model: nn.Module) -> list[_NormBase]:
    layers = statistics_layers(model)
    if model.training:
        return [m for m in layers if m.training]
    if not any(p.requires_grad for p in model.parameters()):  # as for inference
        return layers
    return [m for m in layers if m.weight is None or m.weight.requires_grad]


def _check(model: nn.Module, layers: Sequence[_NormBase]) -> None:
    names = {m: name for name, m in model.named_modules()}
    for layer in layers:
        what = f"layer {names.get(layer, '')!r} ({type(layer).__name__})"
        if layer.running_mean is None:
            raise ValueError(f"{what} keeps no running statistics: leave it out")
        if is_lazy(layer.running_mean):
            raise ValueError(f"{what} has no size yet: run one batch through the model first")


Setting = tuple[nn.Module, str, Any]


def _settings(model: nn.Module, layers: Sequence[_NormBase]) -> Iterator[Setting]:
    """The attributes to set. Flags, for `eval()` and `train()` may be overridden to do more."""
    for module in model.modules():
        yield module, "training", False
        if isinstance(module, DistributedDataParallel):
            yield module, "require_forward_param_sync", False  # else it broadcasts the buffers
        if isinstance(module, DataParallel):
            yield module, "device_ids", module.device_ids[:1]  # hooks and statistics in one place
    for layer in layers:
        yield layer, "track_running_stats", False
        if isinstance(layer, nn.SyncBatchNorm | _InstanceNorm):  # normalise by the input if None
            yield layer, "running_mean", None
            yield layer, "running_var", None
        # in evaluation mode SyncBatchNorm does not wait for the other ranks
        yield layer, "training", not isinstance(layer, nn.SyncBatchNorm)


@contextmanager
def _attributes(settings: Iterable[Setting]) -> Iterator[None]:
    """Attributes as given inside the block, as before after it."""
    settings = list(settings)
    before = [(module, name, getattr(module, name)) for module, name, _ in settings]
    try:
        for module, name, value in settings:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def _uncompiled() -> AbstractContextManager[Any]:
    """Hooks would have compiled code compiled anew, or go unseen by it."""
    if "torch._dynamo" not in sys.modules:  # slow to import, and nothing is compiled without it
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def pass_on(model: nn.Module, batch: Any) -> Any:
    """What `model` makes of a batch: the first of a list or tuple, a mapping by name."""
    if isinstance(batch, list | tuple) and not hasattr(batch, "to"):  # as a PackedSequence has
        batch = batch[0]
    batch = _to(batch, next(chain(model.parameters(), model.buffers())).device)
    return model(**_named(model, batch)) if isinstance(batch, Mapping) else model(batch)


def _to(batch: Any, device: torch.device) -> Any:
    if hasattr(batch, "to"):  # other packages' batches too
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {k: _to(v, device) for k, v in batch.items()}
    if isinstance(batch, list | tuple):
        moved = [_to(v, device) for v in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch


def _named(model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entries of `batch` that the forward method of `model`, without its wrappers, takes."""
    kinds = inspect.Parameter
    takes = list(inspect.signature(model.forward).parameters.values())
    anything = any(p.kind is kinds.VAR_KEYWORD for p in takes)
    inner = getattr(model, "module", getattr(model, "_orig_mod", None))
    if anything and isinstance(inner, nn.Module):
        return _named(inner, batch)
    by_name = [p for p in takes if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
    names = batch.keys() if anything else {p.name for p in by_name} & batch.keys()
    if not names or any(p.default is kinds.empty and p.name not in batch for p in by_name):
        raise ValueError(
            f"a batch has {', '.join(map(str, batch))}, the model's forward takes "
            f"{', '.join(p.name for p in takes)}: pass forward=lambda model, batch: model(...)"
        )
    return {k: v for k, v in batch.items() if k in names}
