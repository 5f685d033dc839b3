"""Checks of one chain against the rules of the protocol; each raises `AssertionError`."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from dgavg.averaging.batchnorm import statistics_layers
from dgavg.chain import find_trainer
from dgavg.config.schema import link_schema
from dgavg.fit import fit
from dgavg.run import Run
from dgavg.testing.toy import toy_run

Settings = Mapping[str, Mapping[str, Any]]


def check_link(name: str, **settings: Any) -> None:
    """All checks on `<name>_basic`; `settings` should make the link act within 12 steps.

    It has a docstring, a typed config with Python's defaults, writes live weights in place only,
    leaves its state alone in wraps, and resumes exactly from a file.
    """
    cls = find_trainer(name)
    assert (cls.__doc__ or "").strip(), f"{name}: no docstring"
    config = OmegaConf.structured(link_schema(cls))
    for f in fields(cls):
        if f.init and f.name != "inner" and not OmegaConf.is_missing(config, f.name):
            assert config[f.name] == f.default, f"{name}.{f.name}: another default in the config"
    spec = name if name == "basic" else f"{name}_basic"
    check_in_place(spec, {name: settings})
    check_reentrant(spec, {name: settings})
    check_resume(spec, {name: settings})


def check_in_place(spec: str, settings: Settings) -> None:
    """Training never rebinds a live tensor."""
    run = toy_run(spec, settings)
    before = {k: v.data_ptr() for k, v in run.model.state_dict().items()}
    fit(run)
    after = {k: v.data_ptr() for k, v in run.model.state_dict().items()}
    assert before == after, f"{spec}: live weights were rebound, not written in place"


def check_reentrant(spec: str, settings: Settings) -> None:
    """Wraps called twice leave the links' state alone and give the same gradient."""
    run = toy_run(spec, settings)
    for t in range(5):
        run.step(run.batches(t))
        run.t += 1
        run.tap("after_step")
    before = copy.deepcopy({k.name: k.state_dict() for k in run.trainer})
    parts = nn.ModuleDict({"model": run.model, "extras": run.extras})
    statistics = {id(b) for layer in statistics_layers(parts) for b in layer.buffers()}
    buffers = {k: (b, b.clone()) for k, b in parts.named_buffers()}
    found = []
    for _ in range(2):
        run.lr()
        run.grad(run.prepare(run.batches(run.t)))
        found.append([p.grad.clone() for p in run.parameters if p.grad is not None])
        for name, (buffer, old) in buffers.items():
            kept = id(buffer) in statistics or torch.equal(buffer, old)
            assert kept, f"{spec}: a wrap changed the buffer {name}; taps own time"
            buffer.copy_(old)  # running statistics move, as they should
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), (
        f"{spec}: a second call in the same step gives another gradient"
    )
    after = {k.name: k.state_dict() for k in run.trainer}
    assert same(before, after), f"{spec}: a wrap changed the state of a link; taps own time"


def check_resume(spec: str, settings: Settings, steps: tuple[int, ...] = (1, 3, 4, 7, 12)) -> None:
    """Saved to a file after any of `steps` and loaded, a run ends as if never stopped."""
    whole, files = toy_run(spec, settings), {}

    def save(run: Run) -> None:
        if run.t in steps:
            files[run.t] = io.BytesIO()
            torch.save(run.state_dict(), files[run.t])

    fit(whole, after_step=save)
    for t, file in files.items():
        file.seek(0)
        again = toy_run(spec, settings)
        again.load_state_dict(torch.load(file, weights_only=True))
        fit(again)
        for part, mine in whole.state_dict().items():
            theirs = again.state_dict()[part]
            assert same(mine, theirs), f"{spec}: {part} differs after a resume at step {t}"


def is_shadow(spec: str, settings: Settings) -> bool:
    """Whether the outermost link of `spec` leaves training alone, to the bit."""
    with_it, inner = toy_run(spec, settings), spec.partition("_")[2]
    rest = {k: v for k, v in settings.items() if k in inner.split("_")}
    without = toy_run(inner, rest)
    fit(with_it)
    fit(without)
    return same(with_it.live, without.live)


def same(a: Any, b: Any) -> bool:
    """Whether nested tensors, numbers, lists and dicts are equal to the bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b
