"""A model as a folder of its own, for whoever has no dgavg."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dgavg.benchmark.files import save_weights
from dgavg.deploy.card import model_card
from dgavg.deploy.library import LIBRARIES, Native, adapted_by, library_of, native, normalisation
from dgavg.deploy.programs import write_onnx, write_torch_export
from dgavg.deploy.saved import Saved
from dgavg.disk import write_text, writing
from dgavg.errors import require, unknown

FORMATS = ("auto", *LIBRARIES)


def export(
    run: Saved,
    out: Path | str,
    *,
    form: str = "auto",
    torch_export: bool = False,
    onnx: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> Path:
    """Write a new folder with all that another program needs to use the model.

    - `model.safetensors`: in the names of timm or torchvision where the backbone is theirs, the
      classifier as their head; else in dgavg's own.
    - `config.json`: timm's, so that `timm.create_model("local-dir:OUT", pretrained=True)` works.
    - `classes.json`, `preprocessing.json`, and `README.md`, the model card.
    - `model.pt2` with `torch_export` (always for models of dgavg's own) and `model.onnx` with
      `onnx`: programs that normalise by themselves, for batches of any size.

    What is written is checked against the model on random images; `note` is told the differences.

    Raises `UserError` for a folder that is there already or can't be written, for models that the
    library can't hold, and for programs that can't be made or differ by more than 1e-4.
    """
    out = Path(out)
    if form not in FORMATS:
        raise unknown("format", form, FORMATS)
    require(not out.exists() and not out.is_symlink(), f"{out} is there already; name a new folder")
    library = library_of(run) if form == "auto" else form
    programs = torch_export or onnx
    if form == "auto" and adapted_by(run) and programs:
        library = None  # a program is what was asked for, and what there can be
    known = native(run, library) if library else None
    with _new_folder(out) as folder:
        files = []
        if torch_export or not (known or programs):
            files.append("model.pt2")
            note(_said(files[-1], write_torch_export(run, folder / files[-1])))
        if onnx:
            files.append("model.onnx")
            note(_said(files[-1], write_onnx(run, folder / files[-1])))
        weights = known.weights if known else run.model.state_dict()
        notes = {"chain": run.record["chain"], "candidate": run.candidate}
        save_weights(folder / "model.safetensors", weights, notes)
        if known and known.library == "timm":
            _write_json(folder / "config.json", timm_config(run, known))
        _write_json(folder / "classes.json", list(run.classes))
        _write_json(folder / "preprocessing.json", preprocessing(run))
        write_text(folder / "README.md", model_card(run, known, files))
    return out


def _said(name: str, difference: float) -> str:
    return f"{name} differs from the model by at most {difference:.1g} on random images"


def preprocessing(run: Saved) -> dict[str, Any]:
    """How an image becomes an input: made RGB or grey, resized whole, divided by 255, normalised.

    The programs do the last by themselves.
    """
    mean, std = normalisation(run)
    return {
        "input_size": list(run.input_shape),
        "mode": "RGB" if run.input_shape[0] == 3 else "L",
        "resize": "whole image to height and width, aspect not kept",
        "interpolation": "bilinear",
        "antialias": True,
        "scale": "1/255",
        "mean": mean,
        "std": std,
    }


def timm_config(run: Saved, form: Native) -> dict[str, Any]:
    """timm's config.json: architecture and `pretrained_cfg`."""
    mean, std = normalisation(run)
    keep = ("pool_size", "fixed_input_size", "first_conv", "classifier")
    arguments = {k: v for k, v in form.arguments.items() if k != "num_classes"}
    return {
        "architecture": form.architecture,
        "num_classes": len(run.classes),
        "num_features": form.features,
        "model_args": arguments,
        "pretrained_cfg": {
            **{k: form.settings[k] for k in keep if form.settings.get(k) is not None},
            "num_classes": len(run.classes),
            "input_size": list(run.input_shape),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "squash",  # the whole image, as in training
            "mean": mean,
            "std": std,
            "label_names": list(run.classes),
        },
    }


def _write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes it at the end; nothing is left of it after an error."""
    beside = out.with_name(f"{out.name}.part-{os.getpid()}")
    with writing(out, "choose another --out"):
        out.parent.mkdir(parents=True, exist_ok=True)
        beside.mkdir()
        try:
            yield beside
            beside.rename(out)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
