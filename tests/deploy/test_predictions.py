"""Predictions for folders of images."""

from __future__ import annotations

import csv
import os

import numpy as np
import pytest
import torch
from PIL import Image

from dgavg.data import load
from dgavg.deploy import load_run, predict
from dgavg.deploy.images import decoded, image_files, read_image


def _table(path):
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def digit_images(tmp_path_factory):
    """The domain that was held out, 45 degrees, as files class/number.png."""
    root = tmp_path_factory.mktemp("digits")
    data = load("digits_rotated", angles=[0, 15, 30, 45, 60, 75], size=16, shuffle_seed=0)
    domain = data.domains[3]
    for i, (image, label) in enumerate(zip(domain.images, domain.labels.tolist(), strict=True)):
        (root / str(label)).mkdir(exist_ok=True)
        Image.fromarray(image[0].numpy()).save(root / str(label) / f"{i:03}.png")
    return root


def _recorded(run):
    parts = [run.scores[f"{run.record['held_out']}/{part}"] for part in ("in", "out")]
    n = sum(part["n"] for part in parts)
    return sum(part["accuracy"] * part["n"] for part in parts) / n


def test_accuracy_on_the_same_images_is_the_recorded_one(train, digit_images, tmp_path):
    run = load_run(train())
    found = predict([run], digit_images, tmp_path / "out.csv")
    assert found.scored == found.labelled == len(list(digit_images.rglob("*.png")))
    assert found.right / found.scored == pytest.approx(_recorded(run), abs=1e-9)
    rows = _table(tmp_path / "out.csv")
    right = sum(row["class"] == row["file"].split("/")[0] for row in rows)
    assert right == found.right


def test_images_of_other_sizes_are_read_as_in_training(timm_run, tree, tmp_path):
    run = load_run(timm_run)
    found = predict([run], tree / "sketch", tmp_path / "out.csv", batch_size=5)
    assert found.scored == 24
    assert found.right / found.scored == pytest.approx(_recorded(run), abs=1e-9)
    data = load("folder", root=str(tree), size=32)
    with torch.no_grad():
        images = data.domains[data.index("sketch")].images.float() / 255
        wanted = run.model(images).softmax(dim=1)
    rows = _table(tmp_path / "out.csv")
    assert [row["file"] for row in rows[:3]] == [f"blue, sky/{i}.png" for i in (0, 1, 10)]
    for row, chances in zip(rows, wanted.tolist(), strict=True):
        assert [float(row[k]) for k in run.classes] == pytest.approx(chances, abs=2e-6)
        assert row["class"] == run.classes[int(np.argmax(chances))]


def test_several_runs_give_the_mean_of_their_probabilities(train, digit_images, tmp_path):
    runs = [load_run(train(), name) for name in ("live", "ema")]
    for i, some in enumerate((runs[:1], runs[1:], runs)):
        predict(some, digit_images / "3", tmp_path / f"{i}.csv")
    one, two, both = (_table(tmp_path / f"{i}.csv") for i in range(3))
    for a, b, mean in zip(one, two, both, strict=True):
        for name in runs[0].classes:
            wanted = (float(a[name]) + float(b[name])) / 2
            assert float(mean[name]) == pytest.approx(wanted, abs=2e-6)
        assert mean["class"] == max(runs[0].classes, key=lambda k: float(mean[k]))


def test_runs_of_other_classes_or_shapes_are_no_ensemble(train, timm_run, refuses, tmp_path, tree):
    digits, images = load_run(train()), load_run(timm_run)
    with refuses("classes", "blue, sky", "share"):
        predict([digits, images], tree, tmp_path / "out.csv")
    larger = load_run(train(data__size=20))
    with refuses("input shape", "1, 20, 20", "1, 16, 16"):
        predict([digits, larger], tree, tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


def test_images_that_cannot_be_read_are_left_out_and_listed(timm_run, tree, tmp_path, refuses):
    good = (tree / "art" / "grass" / "0.png").read_bytes()
    place = tmp_path / "new"
    place.mkdir()
    (place / "a.png").write_bytes(good)
    (place / "b.png").write_bytes(good[: len(good) // 2])
    (place / "c.jpg").write_bytes(b"")
    (place / "d.png").write_bytes(good)
    run, out = load_run(timm_run), tmp_path / "out.csv"
    found = predict([run], place, out)
    assert [(str(file), bool(why)) for file, why in found.bad] == [("b.png", True), ("c.jpg", True)]
    assert [row["file"] for row in _table(out)] == ["a.png", "d.png"]
    assert found.scored == 2
    before = out.read_bytes()
    with refuses("b.png", "cannot be read", "--on-bad-image skip"):
        predict([run], place, out, on_bad_image="error")
    assert out.read_bytes() == before, "a failed command touched the file of the one before"
    for name in ("a.png", "d.png"):
        (place / name).unlink()
    with refuses("none of 2 images", "b.png"):
        predict([run], place, tmp_path / "none.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "out.csv"]


def test_accuracy_counts_images_in_folders_named_like_classes(timm_run, tree, tmp_path):
    run, place = load_run(timm_run), tmp_path / "new"
    for name in ("grass/deep/down", "grass/blue, sky", "loose"):
        (place / name).mkdir(parents=True)
        good = (tree / "art" / "grass" / "0.png").read_bytes()
        (place / name / "x.png").write_bytes(good)
    found = predict([run], place, tmp_path / "out.csv")
    rows = {row["file"]: row["class"] for row in _table(tmp_path / "out.csv")}
    nearest = {"grass/deep/down/x.png": "grass", "grass/blue, sky/x.png": "blue, sky"}
    assert (found.scored, found.labelled) == (3, 2)
    assert found.right == sum(rows[file] == label for file, label in nearest.items()) == 1


def test_one_image_may_be_named(timm_run, tree, tmp_path):
    run = load_run(timm_run)
    predict([run], tree / "art" / "grass" / "0.png", tmp_path / "out.csv")
    (row,) = _table(tmp_path / "out.csv")
    assert row["file"] == "0.png"


def test_images_are_found_as_in_training_data(tmp_path, refuses):
    for name in ("b/z.PNG", "b/c/1.jpg", "a.webp", ".hidden.png", ".git/x.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b" / "c" / "up").symlink_to(tmp_path)
    assert [str(path) for path in image_files(tmp_path)] == ["a.webp", "b/c/1.jpg", "b/z.PNG"]
    (tmp_path / "none").mkdir()
    with refuses("no image in", ".png"):
        image_files(tmp_path / "none")
    with refuses("no folder or image"):
        image_files(tmp_path / "nowhere")


def test_names_that_are_not_text_are_written_as_they_are(timm_run, tree, tmp_path):
    place = tmp_path / "new"
    place.mkdir()
    name = os.fsdecode(b'\xff "odd", name\n.png')
    (place / name).write_bytes((tree / "art" / "grass" / "0.png").read_bytes())
    predict([load_run(timm_run)], place, tmp_path / "out.csv")
    (row,) = _table(tmp_path / "out.csv")
    assert row["file"] == name


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK"])
def test_an_image_is_made_grey_or_rgb_and_resized_whole(tmp_path, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    Image.fromarray(pixels).convert(mode).save(path)
    for channels, wanted in ((1, "L"), (3, "RGB")):
        with Image.open(path) as image:
            small = np.asarray(image.convert(wanted).resize((5, 4), Image.Resampling.BILINEAR))
        found = read_image(path, (channels, 4, 5))
        assert found.shape == (channels, 4, 5)
        assert found.tobytes() == small.reshape(4, 5, channels).transpose(2, 0, 1).tobytes()


def test_few_images_are_held_at_a_time(tmp_path, monkeypatch):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    asked = []

    def paths():
        for i in range(1000):
            asked.append(i)
            yield tmp_path / "x.png"

    images = decoded(paths(), (3, 4, 4), ahead=8)
    for done in range(20):
        assert next(images).shape == (3, 4, 4)
        assert len(asked) <= done + 1 + 8
    images.close()
    assert len(asked) <= 28


def test_a_model_that_looks_at_the_batch_reads_as_many_as_it_was_scored_with(
    train, digit_images, tmp_path
):
    run = load_run(train("arm_basic", trainer__arm__support=7), "live")
    assert run.support == 7
    for size in (1, 10, 64):
        predict([run], digit_images / "3", tmp_path / f"{size}.csv", batch_size=size)
    texts = {(tmp_path / f"{size}.csv").read_text() for size in (1, 10, 64)}
    assert len(texts) == 1, "where batches end made a difference"
    files = sorted((digit_images / "3").iterdir())[:7]
    images = torch.from_numpy(np.stack([read_image(f, (1, 16, 16)) for f in files])).float() / 255
    with torch.no_grad():
        wanted = run.model(images).softmax(dim=1)
    for row, chances in zip(_table(tmp_path / "1.csv"), wanted.tolist(), strict=False):
        assert [float(row[k]) for k in run.classes] == pytest.approx(chances, abs=2e-6)


def test_inputs_that_no_image_can_be_are_refused(train, tmp_path, refuses, digit_images):
    run = load_run(train())
    for shape in ((2, 28, 28), (1280, 1, 1), (3, 1, 1)):
        object.__setattr__(run, "input_shape", shape)
        with refuses("×".join(map(str, shape)), "features"):
            predict([run], digit_images, tmp_path / "out.csv")


def test_mistakes_about_the_output_are_found_before_any_work(
    train, digit_images, tmp_path, refuses
):
    run = load_run(train())
    with refuses("no folder", "nowhere"):
        predict([run], digit_images, tmp_path / "nowhere" / "out.csv")
    with refuses("is a folder"):
        predict([run], digit_images, tmp_path)
    with refuses("batch size 0"):
        predict([run], digit_images, tmp_path / "out.csv", batch_size=0)
    with refuses("'drop'", "skip, error"):
        predict([run], digit_images, tmp_path / "out.csv", on_bad_image="drop")
