"""Exported folders, loaded by those who have no dgavg."""

from __future__ import annotations

import ast
import io
import json
import os
import re
from contextlib import redirect_stdout
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dgavg.averaging import recalibrate_batchnorm
from dgavg.deploy import export, library, load_run, programs
from dgavg.deploy.images import read_image
from dgavg.deploy.library import random_images
from dgavg.deploy.predict import probabilities

SHORT = {"protocol__steps": 2}
SHUFFLENET = {
    "model": "torchvision",
    "model__backbone": "shufflenet_v2_x0_5",
    "model__dropout": 0.2,
    "data": "folder",
    **SHORT,
}


def _snippets(folder):
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)


def _printed(text):
    """The probabilities by class that a snippet printed."""
    return ast.literal_eval(text.strip().splitlines()[-1])


def _run(code):
    """What a snippet prints."""
    with redirect_stdout(io.StringIO()) as out:
        exec(code, {})
    return out.getvalue()


def _wanted(run, path):
    image = torch.from_numpy(read_image(path, run.input_shape))[None].float() / 255
    return dict(zip(run.classes, probabilities([run], image)[0].tolist(), strict=True))


def _logits(run, images):
    with torch.no_grad():
        return run.model(images)


def _jobs(folder, run, tree):
    """The whole snippets of a card, and a real image for them to read."""
    mode = "RGB" if run.input_shape[0] == 3 else "L"
    Image.open(tree / "art" / "grass" / "3.png").convert(mode).save(folder / "image.png")
    return [(folder, code) for code in _snippets(folder) if "print(" in code]


@pytest.fixture
def awake(tree):
    """`awake(folder)`: a run that tells images apart, as those of a few steps hardly do."""

    def load(folder, candidate=None):
        run = load_run(folder, candidate)
        files = sorted((tree / "art").rglob("*.png"))
        pixels = np.stack([read_image(file, run.input_shape) for file in files])
        images = torch.from_numpy(pixels).float() / 255
        recalibrate_batchnorm(run.model, [images])
        logits, head = _logits(run, images), run.model.classifier
        with torch.no_grad():
            scale = logits.std(dim=0).mean()
            head.weight.div_(scale)
            head.bias.sub_(logits.mean(dim=0)).div_(scale)
        return run

    return load


@pytest.fixture
def as_in_dgavg(monkeypatch, tree):
    """`as_in_dgavg(folder, run, n)`: its `n` snippets print what dgavg predicts for an image."""

    def check(folder, run, n=1):
        jobs = _jobs(folder, run, tree)
        assert len(jobs) == n
        monkeypatch.chdir(folder)
        for _, code in jobs:
            wanted = _wanted(run, folder / "image.png")
            assert _printed(_run(code)) == pytest.approx(wanted, abs=1e-5)

    return check


def test_cards_say_how_to_load_a_model_where_there_is_no_dgavg(
    timm_run, train, tree, tmp_path, without_dgavg, awake
):
    pytest.importorskip("onnxruntime")
    said, jobs, wanted = [], [], []
    for i, run in enumerate(map(awake, (timm_run, train("basic", **SHUFFLENET)))):
        programs = {"torch_export": i == 0, "onnx": i == 0}
        folder = export(run, tmp_path / str(i), **programs, note=said.append)
        found = _jobs(folder, run, tree)
        assert len(found) == (3 if i == 0 else 1)
        jobs += found
        wanted += [_wanted(run, folder / "image.png")] * len(found)
    assert [text.split()[0] for text in said] == ["model.pt2", "model.onnx"]
    for text, chances in zip(without_dgavg(jobs), wanted, strict=True):
        assert _printed(text) == pytest.approx(chances, abs=1e-5)


def test_plain_timm_loads_it(timm_run, tmp_path, monkeypatch, awake):
    import timm

    run = awake(timm_run, "ema")
    folder = export(run, tmp_path / "out")
    files = {path.name for path in folder.iterdir()}
    names = {"README.md", "classes.json", "config.json", "model.safetensors", "preprocessing.json"}
    assert files == names
    path = str(folder / "model.safetensors")
    model = timm.create_model("lcnet_035", num_classes=2, checkpoint_path=path).eval()
    images = random_images(run, 3)
    mean, std = (torch.tensor(model.pretrained_cfg[k]).view(-1, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        found = model((images - mean) / std)
    assert torch.allclose(found, _logits(run, images), atol=1e-5)
    assert json.loads((folder / "classes.json").read_text()) == ["blue, sky", "grass"]
    (code,) = [c for c in _snippets(folder) if "checkpoint_path" in c]
    monkeypatch.chdir(folder)
    assert _run(f"{code}\nprint(tuple(model.classifier.weight.shape))").strip() == "(2, 1280)"


def test_timm_knows_size_normalisation_and_names(timm_run, tmp_path):
    import timm
    from timm.data import resolve_model_data_config

    folder = export(load_run(timm_run), tmp_path / "out")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    found = resolve_model_data_config(model)
    assert tuple(found["input_size"]) == (3, 32, 32)
    assert (found["crop_pct"], found["crop_mode"]) == (1.0, "squash")
    assert found["interpolation"] == "bilinear"
    assert found["mean"] == pytest.approx((0.485, 0.456, 0.406))
    assert model.pretrained_cfg["label_names"] == ["blue, sky", "grass"]


@pytest.mark.parametrize(
    "backbone",
    [
        pytest.param("tf_efficientnet_lite0", marks=pytest.mark.slow),
        "vit_tiny_patch16_224",  # of fixed size
        "deit_tiny_distilled_patch16_224",  # two heads, averaged
        "convnext_atto",  # a head in which the classifier is a part
    ],
)
def test_backbones_of_every_build_go_back_into_timm(backbone, train, tmp_path, as_in_dgavg, awake):
    run = awake(train("basic", model="timm", data="folder", model__backbone=backbone, **SHORT))
    as_in_dgavg(export(run, tmp_path / "out"), run)


def test_grey_images_stay_grey(train, tmp_path, as_in_dgavg, awake):
    settings = {"model__backbone": "lcnet_035", "data__angles": [0, 45], **SHORT}
    run = awake(train("basic", model="timm", **settings))
    as_in_dgavg(export(run, tmp_path / "out"), run)


def test_plain_torchvision_loads_heads_of_one_layer_and_of_more(
    train, tmp_path, as_in_dgavg, awake
):
    for i, more in enumerate(({}, {"model__backbone": "mobilenet_v3_small"})):
        run = awake(train("basic", **{**SHUFFLENET, **more}))
        folder = export(run, tmp_path / str(i), form="torchvision")
        assert not (folder / "config.json").exists()
        as_in_dgavg(folder, run)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"model": "resnet18"},
        {"model": "domainbed", "model__resnet18": True, "model__weights": None},
        {"model": "domainbed", "model__weights": None},
    ],
)
def test_models_that_are_torchvisions_by_another_name(
    settings, train, tmp_path, as_in_dgavg, awake
):
    run = awake(train("basic", data="folder", **settings, **SHORT))
    as_in_dgavg(export(run, tmp_path / "out"), run)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"name": "resnet18"}, "resnet18"),
        ({"name": "domainbed", "resnet18": False}, "resnet50"),
        ({"name": "domainbed", "resnet18": True}, "resnet18"),
        ({"name": "timm", "backbone": "resnet50.tv_in1k"}, "resnet50"),
    ],
)
def test_backbones_are_called_what_their_library_calls_them(settings, name):
    assert library._architecture(SimpleNamespace(config={"model": settings})) == name


def test_our_own_models_are_programs_for_plain_torch(train, tmp_path, as_in_dgavg):
    run = load_run(train())
    folder = export(run, tmp_path / "out")
    program = torch.export.load(folder / "model.pt2").module()
    for size in (1, 7):
        images = random_images(run, size)
        assert torch.allclose(program(images), _logits(run, images), atol=1e-6)
    as_in_dgavg(folder, run)
    assert load_file(folder / "model.safetensors").keys() == run.model.state_dict().keys()


def test_onnx_takes_batches_of_any_size(train, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    run = load_run(train())
    folder = export(run, tmp_path / "out", onnx=True)
    assert not (folder / "model.pt2").exists()
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    for size in (1, 9):
        images = random_images(run, size)
        found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        assert torch.allclose(found, _logits(run, images), atol=1e-4)


@pytest.mark.parametrize("chain", ["mtl_basic", "arm_basic"])
def test_links_that_changed_the_model_need_a_program(chain, train, tmp_path, refuses):
    settings = {"model": "timm", "data": "folder", "model__backbone": "lcnet_035"}
    run = load_run(train(chain, **settings, **SHORT))
    for form in ("auto", "timm"):
        with refuses(chain.partition("_")[0], "plain timm", "--torch-export"):
            export(run, tmp_path / "out", form=form)
    assert not list(tmp_path.iterdir())
    folder = export(run, tmp_path / "out", torch_export=True)
    program = torch.export.load(folder / "model.pt2").module()
    images = random_images(run, 6)
    assert torch.allclose(program(images), _logits(run, images), atol=1e-5)
    assert not (folder / "config.json").exists()
    text = (folder / "README.md").read_text()
    assert ("32 at a time" in text) == (chain == "arm_basic")


def test_the_library_must_be_that_of_the_model(train, timm_run, tmp_path, refuses):
    with refuses("'lcnet_035'", "not torchvision's", "--torch-export"):
        export(load_run(timm_run), tmp_path / "out", form="torchvision")
    with refuses("'mlp'", "not timm's"):
        export(load_run(train()), tmp_path / "out", form="timm")
    with refuses("'keras'", "auto, timm, torchvision"):
        export(load_run(train()), tmp_path / "out", form="keras")


def test_a_model_that_the_library_would_build_otherwise_is_refused(train, tmp_path, refuses):
    digits = {"data": "digits_rotated", "data__angles": [0, 45], "data__size": 32}
    run = load_run(train("basic", **{**SHUFFLENET, **digits}))  # one channel
    with refuses("plain torchvision can't hold", "conv1.0.weight", "--torch-export"):
        export(run, tmp_path / "out")
    run = load_run(train("basic", **SHUFFLENET))
    run.model.featurizer.backbone.register_forward_hook(lambda net, x, features: features + 1)
    with refuses("outputs differ"):
        export(run, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_programs_that_differ_from_the_model_are_not_written(train, tmp_path, refuses, monkeypatch):
    pytest.importorskip("onnxruntime")
    run, other = load_run(train(), "live"), load_run(train(), "live")
    with torch.no_grad():
        other.model.classifier.bias += 0.01
    traced = programs._traced
    monkeypatch.setattr(programs, "_traced", lambda run: traced(other))
    for options in ({"torch_export": True}, {"onnx": True}):
        with refuses("differ from the model's", "0.00"):
            export(run, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_refused_and_failure_leaves_none(train, tmp_path, refuses):
    run = load_run(train())
    (tmp_path / "there").mkdir()
    with refuses("is there already"):
        export(run, tmp_path / "there")
    if os.geteuid():  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        with refuses("cannot be written", "--out"):
            export(run, tmp_path / "locked" / "out")
    (tmp_path / "file").touch()
    with refuses("cannot be written", "--out"):
        export(run, tmp_path / "file" / "out")
    assert export(run, tmp_path / "new" / "deep" / "out").is_dir()


def test_the_card_says_where_the_model_comes_from(timm_run, tmp_path):
    run = load_run(timm_run, "ema")
    text = (export(run, tmp_path / "out") / "README.md").read_text()
    assert text.startswith("---\n")
    assert "library_name: timm" in text
    for part in (
        "Trained on the domains art, photo; never on **sketch**",
        "32 × 32 pixels into 2 classes: blue, sky, grass",
        f"candidate `ema` of step {run.record['step']}",
        f"Batch norm: `{run.record['candidates']['ema']['batchnorm']}`",
        "decay:",
        "eval_every: 2",
        "backbone: lcnet_035",
    ):
        assert part in text
    for split, score in run.scores.items():
        row = next(line for line in text.splitlines() if f"{split}" in line and "|" in line)
        assert f" {100 * score['accuracy']:.2f} |" in row
        assert row.endswith(f" {score['n']} |")
        assert ("held out" in row) == split.startswith("sketch")


def test_preprocessing_is_what_the_model_was_trained_with(train, tmp_path):
    folder = export(
        load_run(train("basic", **SHUFFLENET)),
        tmp_path / "out",
    )
    found = json.loads((folder / "preprocessing.json").read_text())
    assert (found["input_size"], found["mode"]) == ([3, 32, 32], "RGB")
    assert found["mean"] == [0.485, 0.456, 0.406]
    assert found["std"] == [0.229, 0.224, 0.225]
    folder = export(load_run(train()), tmp_path / "grey")
    found = json.loads((folder / "preprocessing.json").read_text())
    assert (found["mode"], found["mean"], found["std"]) == ("L", [0.0], [1.0])
