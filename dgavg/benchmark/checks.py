"""Checks of composed settings, before data are read or a file is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dgavg.benchmark.tensorboard import summary_writer
from dgavg.chain import function_name, spec_of
from dgavg.distributed import check_devices, local_rank, ranks
from dgavg.errors import UserError, require, unknown
from dgavg.evaluation import RULES, Stopping
from dgavg.run import COMPILE, PRECISIONS
from dgavg.stacked import check_stackable
from dgavg.trainer import Trainer

ALSO = ("keep", "recalibrate")  # what any average can be scored by beside its own policy


def check_choices(settings: Mapping[str, Any], protocol: Mapping[str, Any]) -> None:
    """Raise `UserError` for a setting that is none of its choices, or below what it may be."""
    for value, choices, name in (
        (protocol["test_split"], ("in", "all"), "protocol.test_split"),
        (protocol["selection"], tuple(RULES), "protocol.selection"),
        (protocol["splits"], ("domainbed", "official"), "protocol.splits"),
        (settings["precision"], tuple(PRECISIONS), "precision"),
        (settings["scoring"], (None, *PRECISIONS), "scoring"),
        (settings["evaluate"], ("selection", "picked", "all"), "evaluate"),
        (settings["logger"], (None, "tensorboard"), "logger"),
    ):
        shown = ", ".join("null" if c is None else c for c in choices)
        require(value in choices, f"{name}={value}: choose one of {shown}")
    require(
        settings["evaluate"] != "picked" or protocol["selection"] in ("validation", "last"),
        f"evaluate=picked goes by validation or takes the last checkpoint, but protocol.selection="
        f"{protocol['selection']}: write evaluate=selection",
    )
    for policy in settings["also_batchnorm"]:
        if policy not in ALSO:
            raise unknown("batch-norm policy", policy, ALSO, "also_batchnorm")
    if settings["logger"] == "tensorboard":
        summary_writer()  # is it there?
    for key in ("steps", "batch_size", "eval_every"):
        require(protocol[key] > 0, f"protocol.{key}={protocol[key]}: at least 1")
    first = protocol["first_eval"]
    require(first is None or first > 0, f"protocol.first_eval={first}: at least 1, or null")
    init_seed = settings["init_seed"]
    require(
        init_seed is None or 0 <= init_seed < 2**32,
        f"init_seed={init_seed}: a number from 0 on, or null",
    )
    size, threads, stack = (settings[key] for key in ("eval_batch_size", "threads", "stack"))
    require(stack > 0, f"stack={stack}: a number of runs, 1 for one after the other")
    require(size > 0, f"eval_batch_size={size}: at least 1")
    require(threads is None or threads > 0, f"threads={threads}: at least 1, or null")


def check_candidates(trainer: Trainer, wanted: Sequence[str], where: str) -> None:
    """Raise `UserError` for a name that no candidate of the chain will have."""
    known = ["live", *(name for link in trainer for name in link.candidate_names())]
    for name in wanted:
        base, at, policy = name.partition("@")
        require(
            not at or base not in known,
            f"{where}: {name!r} is {base!r} by another batch-norm policy: write {base}, and "
            f"also_batchnorm=[{policy}]",
        )
        if name not in known:
            raise unknown("candidate", name, known, f"the chain {spec_of(trainer)!r} ({where})")


def deciding(trainer: Trainer, stopping: Stopping) -> set[str]:
    """The candidates by whose validation scores links or early stopping decide.

    Raises `UserError` for a name that no candidate of the chain will have.
    """
    watched = [stopping.candidate] if stopping.candidate is not None else []
    check_candidates(trainer, watched, "stopping.candidate")
    return {*watched, *(name for link in trainer for name in link.decides_by())}


def check_scored(trainer: Trainer, wanted: Sequence[str] | None) -> None:
    """Raise `UserError` for candidates to score that the chain will not have, or none."""
    require(wanted != [], "candidates=[]: name at least one, or write candidates=null for all")
    check_candidates(trainer, wanted or (), "candidates")


def check_last(trainer: Trainer, stopping: Stopping) -> None:
    """Refuse what may end a run early where candidates are scored at its end alone."""
    early = ["stopping.candidate"] if stopping.candidate is not None else []
    early += [link.name for link in trainer if link.may_end()]
    require(
        not early,
        "evaluate=picked protocol.selection=last scores what a run ends with alone, but "
        f"{' and '.join(early)} may end a run before: write evaluate=selection",
    )


def check_stack(trainer: Trainer, settings: Mapping[str, Any]) -> None:
    """Refuse what several runs as one can't do; what models can is seen when they are built."""
    check_stackable(trainer)
    stack = settings["stack"]
    require(ranks() == 1, f"stack={stack} trains in one process: start dgavg without torchrun")
    for name, value, fine in (
        ("stopping.candidate", settings["stopping"]["candidate"], (None,)),
        ("optimizer.clip", settings["optimizer"].get("clip"), (None,)),
        ("precision", settings["precision"], ("fp32", "bf16")),
        ("compile", settings["compile"], (False, None)),
        ("logger", settings["logger"], (None,)),
        ("evaluate", settings["evaluate"], ("selection", "all")),
    ):
        require(value in fine, f"stack={settings['stack']} takes no {name}={value}: write stack=1")


def check_without_validation(trainer: Trainer, stopping: Stopping, selection: str) -> None:
    """Refuse what reads validation data where `protocol.holdout_fraction=0` leaves none."""
    none = "protocol.holdout_fraction=0 leaves no validation data"
    require(selection == "last", f"{none} to select by: write protocol.selection=last")
    require(stopping.candidate is None, f"{none} to stop by: write stopping.candidate=null")
    needy = [link.name for link in trainer if link.decides_by()]
    require(not needy, f"{none}, which {', '.join(needy)} in {spec_of(trainer)!r} decides by")


def check_functions(trainer: Trainer) -> None:
    """Records name a setting that is a function by its name, so it needs one of its own."""
    for link in trainer:
        for key, value in link.settings().items():
            name = function_name(value) if callable(value) else ""
            require(
                "<" not in name,
                f"trainer.{link.name}.{key} is {name}: records could not tell it from another; "
                "give it a name, as a function of a module",
            )


def find_compile(value: Any, device: torch.device) -> str | None:
    """The mode of `torch.compile` that `compile` means; none where it is false.

    Raises `UserError` for another value, and on a CPU where there is no C++ compiler.
    """
    if value in (False, None):
        return None
    mode = "default" if value is True else str(value)
    require(mode in COMPILE, f"compile={value}: choose false, true, {', '.join(COMPILE[1:])}")
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler  # slow to import
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            message = f"compile={value} needs a C++ compiler: install g++, or set CXX to one"
            raise UserError(message) from None
    return mode


def find_device(name: str) -> torch.device:
    """The device called `name`; `auto` is a GPU where there is one.

    Of several processes each has a GPU of its own. Raises `UserError` for one that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks() > 1 and name != "cpu":
        require(
            name == "cuda",
            f"device={name} is one device for {ranks()} processes; write device=cuda or device=cpu",
        )
        check_devices()
        return torch.device("cuda", local_rank())
    try:
        device = torch.device(name)
    except RuntimeError:
        raise unknown("device", name, ["auto", "cpu", "cuda", "cuda:1", "mps"]) from None
    count = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }
    there = count.get(device.type, 0)
    what = f"there are {there}, counted from 0" if there else "there is no such device here"
    require((device.index or 0) < there, f"device={name}: {what}; write device=auto or device=cpu")
    return device
