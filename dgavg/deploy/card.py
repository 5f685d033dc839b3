"""The model card of an exported model: where it comes from, what it scored, how it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf

import dgavg
from dgavg.benchmark.results import title_of
from dgavg.deploy.library import Native, normalisation
from dgavg.deploy.saved import Saved
from dgavg.evaluation import RULES
from dgavg.evaluation.selection import held_out_of

TIMM = """
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

model = timm.create_model("local-dir:.", pretrained=True).eval()  # "." is this folder
transform = create_transform(**resolve_model_data_config(model))
image = Image.open("image.png").convert("{mode}")
with torch.no_grad():
    probabilities = model(transform(image)[None]).softmax(dim=1)[0].tolist()
print(dict(zip(model.pretrained_cfg["label_names"], probabilities)))
"""

OLD_TIMM = """
import timm

model = timm.create_model(
    "{architecture}", {arguments}checkpoint_path="model.safetensors"
)
"""

IMAGE = """image = Image.open("image.png").convert("{mode}")
image = image.resize(({width}, {height}), Image.Resampling.BILINEAR)
x = torch.from_numpy(np.array(image)).float().div(255).reshape(1, {height}, {width}, {channels})
x = x.permute(0, 3, 1, 2)  # (1, {channels}, {height}, {width}) in [0, 1]"""

AFTER = """
with torch.no_grad():
    probabilities = {call}.softmax(dim=1)[0].tolist()
print(dict(zip(json.loads(Path("classes.json").read_text()), probabilities)))
"""

TORCHVISION = """
import json
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file

model = torchvision.models.get_model("{architecture}", {arguments}).eval()
model.load_state_dict(load_file("model.safetensors"))
"""

PROGRAM = """
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

model = torch.export.load("model.pt2").module()  # normalises by itself
"""

ONNX = """
import json
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from PIL import Image

session = onnxruntime.InferenceSession("model.onnx")  # normalises by itself
"""


def model_card(run: Saved, form: Native | None, files: Sequence[str]) -> str:
    """The text of README.md; `files` are the programs beside the weights."""
    parts = [
        _front(run, form),
        f"# {run.record['chain']} on {_data(run)}: `{run.candidate}`",
        _what(run),
        "## Load it",
        *_loading(run, form, files),
        "## What it scored",
        _numbers(run),
        "## How it was trained",
        _training(run),
    ]
    return "\n\n".join(parts) + "\n"


def _front(run: Saved, form: Native | None) -> str:
    """What model hubs read."""
    library = form.library if form else "pytorch"
    return "\n".join(
        [
            "---",
            "tags:",
            "- image-classification",
            "- domain-generalization",
            f"library_name: {library}",
            "---",
        ]
    )


def _data(run: Saved) -> str:
    return title_of(run.config["data"])


def _what(run: Saved) -> str:
    record = run.record
    left_out = [d for d in run.domains if d in held_out_of(record)]
    others = [d for d in run.domains if d not in left_out]
    channels, height, width = run.input_shape
    return (
        f"Classifies {'RGB' if channels == 3 else f'{channels}-channel'} images of "
        f"{height} × {width} pixels into {len(run.classes)} classes: {', '.join(run.classes)}. "
        f"Trained on the domains {', '.join(others)}; never on **{', '.join(left_out)}**, which "
        "shows how it does on a domain it has not seen."
    )


def _loading(run: Saved, form: Native | None, files: Sequence[str]) -> list[str]:
    channels, height, width = run.input_shape
    shape = {"channels": channels, "height": height, "width": width}
    shape["mode"] = "RGB" if channels == 3 else "L"  # type: ignore[assignment]
    image, found = IMAGE.format(**shape), []
    if form is not None:
        given = {"architecture": form.architecture}
        words = [f"{k}={v}" for k, v in form.arguments.items()]
        if form.library == "timm":
            text = "Where timm is too old to know `local-dir:`, with a normalisation of your own:"
            old = OLD_TIMM.format(**given, arguments="".join(f"{w}, " for w in words))
            found += [_code(TIMM.format(**shape)), text, _code(old)]
        else:
            mean, std = (tuple(v) for v in normalisation(run))
            norm = (
                f"\nmean, std = (torch.tensor(v).view(-1, 1, 1) for v in ({mean}, {std}))"
                "\nx = (x - mean) / std"
            )
            head = TORCHVISION.format(**given, arguments=", ".join(words))
            found.append(_code(head + image + norm + AFTER.format(call="model(x)")))
    if "model.pt2" in files:
        found += ["By torch alone:", _code(PROGRAM + image + AFTER.format(call="model(x)"))]
    if "model.onnx" in files:
        call = 'torch.from_numpy(session.run(None, {"images": x.numpy()})[0])'
        found += ["By ONNX Runtime:", _code(ONNX + image + AFTER.format(call=call))]
    if form is None:
        found.append(
            "`model.safetensors` has the weights in dgavg's own names, for "
            "`model.weights=model.safetensors`."
        )
    if run.support is not None:
        found.append(
            "Predictions depend on the other images of a batch: give it images of one domain, "
            f"{run.support} at a time."
        )
    return found


def _code(text: str) -> str:
    return f"```python\n{text.strip()}\n```"


def _numbers(run: Saved) -> str:
    record, held_out = run.record, run.record["held_out"]
    rows = ["| split | accuracy, % | loss | images |", "| --- | ---: | ---: | ---: |"]
    for split, score in run.scores.items():
        where = f"**{split}** (held out)" if split.rpartition("/")[0] == held_out else split
        loss = "not finite" if score["loss"] is None else f"{score['loss']:.4f}"
        rows.append(f"| {where} | {100 * score['accuracy']:.2f} | {loss} | {score['n']} |")
    policy = record["candidates"][run.candidate]["batchnorm"]
    rule = record["protocol"]["selection"]
    lines = [
        "\n".join(rows),
        f"Weights: candidate `{run.candidate}` of step {record['step']}, selected by the rule "
        f"`{rule}` ({RULES.get(rule, 'of its own')}). Batch norm: `{policy}`.",
    ]
    measured = {k: v for k, v in record.get("timing", {}).items() if v is not None}
    if measured:
        lines.append(_list(measured))
    return "\n\n".join(lines)


def _training(run: Saved) -> str:
    record = run.record
    keys = ("trainer", "data", "model", "optimizer", "protocol", "precision", "seed", "init_seed")
    settings = {k: record[k] for k in keys if k in record}
    members = {k: v for k, v in record.items() if k == "members"}
    text = OmegaConf.to_yaml(OmegaConf.create({**settings, **_brief(members)}))
    return f"With dgavg {dgavg.__version__}, by these settings:\n\n```yaml\n{text.strip()}\n```"


def _brief(found: Mapping[str, Any]) -> dict[str, Any]:
    """Of a soup's runs, without their scores."""
    runs = [{k: v for k, v in m.items() if k != "splits"} for m in found.get("members", ())]
    return {"members": runs} if runs else {}


def _list(found: Mapping[str, Any]) -> str:
    return "\n".join(
        f"- {key}: {value:.1f}" if isinstance(value, float) else f"- {key}: {value}"
        for key, value in found.items()
    )
