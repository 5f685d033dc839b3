"""`dgavg features`: what it writes, from settings and from runs, and what it refuses."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from dgavg import leave_one_domain_out
from dgavg.commands.features import _official, compute, features
from dgavg.data import Domain, DomainDataset, Splits, load
from dgavg.errors import UserError
from dgavg.models import Model, build_model
from dgavg.seeding import seed_everything

CPU = torch.device("cpu")
SMALL = ["data=digits_rotated", "model=mlp", "model.width=8", "model.depth=1"]
NET = "shufflenet_v2_x0_5"
REAL = Path(
    os.environ.get("DGAVG_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data")
)
WEIGHTS = REAL / "weights" / "tf_efficientnet_lite0_imagenet1k.safetensors"
STORED = REAL / "features" / "pacs_tf_lite0_224.npz"


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def made_by(model: Model, data: DomainDataset) -> np.ndarray:
    with torch.no_grad():
        parts = [model.eval().featurizer(d.images.float() / 255) for d in data.domains]
    return torch.cat(parts).half().numpy()


def toy(sizes: tuple[int, ...] = (5, 9), official: Splits | None = None) -> DomainDataset:
    rng = torch.Generator().manual_seed(1)
    domains = [
        Domain(
            f"domain{i}",
            torch.randint(0, 256, (n, 1, 2, 2), generator=rng, dtype=torch.uint8),
            torch.arange(n) % 3,
        )
        for i, n in enumerate(sizes)
    ]
    return DomainDataset("toy", tuple(domains), ("a", "b", "c"), official=official)


def test_settings_give_a_file_that_data_features_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.npz"
    features([*SMALL, "--out", str(out), "eval_batch_size=100"])
    data = load("digits_rotated")
    seed_everything(0)
    model = build_model("mlp", data.input_shape, 10, width=8, depth=1)
    found = arrays(out)
    assert found["X"].dtype == np.float16
    np.testing.assert_allclose(found["X"], made_by(model, data), rtol=2e-3, atol=1e-4)
    assert found["X"].std() > 0.01
    assert found["y"].dtype == np.int64
    assert found["y"].tolist() == torch.cat([d.labels for d in data.domains]).tolist()
    assert found["d"].tolist() == [i for i, d in enumerate(data.domains) for _ in range(len(d))]
    assert found["domains"].tolist() == list(data.names)
    assert found["classes"].tolist() == list(data.classes)
    assert str(found["title"]) == "digits_rotated-mlp"
    assert str(found["content"]) == data.fingerprint()
    assert "train" not in found
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]

    again = load("features", file=str(out))
    assert again.input_shape == (8, 1, 1)
    assert again.names == data.names
    printed = capsys.readouterr()
    assert f"{out}: 1797 × 8 features, digits_rotated-mlp" in printed.out
    assert "features of random ones" in printed.err

    features([*SMALL, "init_seed=1", "--out", str(tmp_path / "y.npz")])
    assert not np.array_equal(arrays(tmp_path / "y.npz")["X"], found["X"])


def test_weights_of_a_file_are_not_called_random(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for domain in ("north", "south"):
        for label in ("cat", "dog"):
            folder = tmp_path / "tree" / domain / label
            folder.mkdir(parents=True)
            for i in range(3):
                pixels = np.random.RandomState(i).randint(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    donor = build_model("torchvision", (3, 32, 32), 5, backbone=NET)
    for layer in donor.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad():
        donor(torch.rand(64, 3, 32, 32))  # with the statistics of new layers, features vanish
    torch.save(donor.state_dict(), tmp_path / "w.pt")
    words = ["data=folder", f"data.root={tmp_path / 'tree'}", "data.size=32", "data.cache=none"]
    model = ["model=torchvision", f"model.backbone={NET}"]
    model += [f"model.weights={tmp_path / 'w.pt'}", "device=cpu"]
    with pytest.raises(UserError, match=r"2 of another shape \(classifier\.weight 5×1024 for"):
        features([*words, *model, "--out", str(tmp_path / "x.npz")])
    library = {
        n.removeprefix("featurizer.backbone."): t
        for n, t in donor.state_dict().items()
        if n.startswith("featurizer")
    }
    torch.save(library, tmp_path / "w.pt")
    features([*words, *model, "--out", str(tmp_path / "x.npz")])
    found = arrays(tmp_path / "x.npz")
    data = load("folder", root=str(tmp_path / "tree"), size=32, cache="none")
    expected = made_by(donor, data)
    np.testing.assert_allclose(found["X"], expected, rtol=1e-2, atol=1e-3 * expected.max())
    assert found["classes"].tolist() == ["cat", "dog"]
    assert str(found["title"]) == f"folder-{NET}"
    assert "random" not in capsys.readouterr().err


class Beside(nn.Module):
    """Features that depend on the batch, on the mode, and on nothing else."""

    def forward(self, x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        flat = x.flatten(1)
        mean = flat.mean(0, keepdim=True).expand_as(flat)
        return torch.cat([flat, mean, torch.full_like(flat, float(self.training))], dim=1)


@pytest.mark.parametrize(("support", "size"), [(None, 4), (4, 64)])
def test_batches_are_of_one_domain_and_of_the_size_that_a_prediction_depends_on(
    support: int | None, size: int
) -> None:
    data = toy()
    model = Model(Beside(), nn.Linear(12, 3))
    if support is not None:
        model.support = support  # as links set it
    found = compute(model, data, CPU, batch_size=size)
    expected = []
    for domain in data.domains:
        for images in torch.split(domain.images, 4):
            flat = images.flatten(1).float() / 255
            mean = flat.mean(0, keepdim=True).expand_as(flat)
            expected.append(torch.cat([flat, mean, torch.zeros_like(flat)], 1))
    np.testing.assert_array_equal(found, torch.cat(expected).half().numpy())


def test_precision_is_that_of_the_forward_pass() -> None:
    data = toy((20, 20))
    torch.manual_seed(0)
    model = Model(nn.Sequential(nn.Flatten(), nn.Linear(4, 6)), nn.Linear(6, 3))
    full, half = (compute(model, data, CPU, precision) for precision in ("fp32", "bf16"))
    assert not np.array_equal(full, half)
    np.testing.assert_allclose(full, half, atol=0.02)
    bf16 = torch.from_numpy(half.astype(np.float32))
    assert torch.equal(bf16, bf16.bfloat16().float())


def test_features_beyond_float16_are_refused() -> None:
    class Huge(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) * 1e6

    with pytest.raises(UserError, match="features of domain 'domain0' are not finite in float16"):
        compute(Model(Huge(), nn.Linear(4, 3)), toy(), CPU)


def test_official_lists_go_into_the_file_where_it_can_say_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def keys(*numbers: int) -> np.ndarray:
        return np.array(numbers, np.int64)

    out, in_ = (keys(0, 3), keys(8)), (keys(1, 2, 4), keys(*range(7)))
    everything = (np.arange(5), np.arange(9))
    assert _official(toy()) is None
    assert capsys.readouterr().err == ""
    train = _official(toy(official=Splits(out, in_, everything)))
    assert train is not None
    assert np.flatnonzero(train).tolist() == [1, 2, 4, *range(5, 12)]
    assert "1 image(s) in neither go to the validation part" in capsys.readouterr().err
    for test in (None, (np.arange(5), np.arange(8))):
        assert _official(toy(official=Splits(out, in_, test))) is None
        assert "don't test on all images" in capsys.readouterr().err


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a small network on digits."""
    runs = tmp_path_factory.mktemp("runs")
    settings = {"protocol.steps": 6, "protocol.eval_every": 3, "model.width": 8, "model.depth": 1}
    settings |= {"precision": "bf16"}
    leave_one_domain_out(
        "ema_basic",
        data="digits_rotated",
        model="mlp",
        holdout=["45"],
        seeds=[3],
        settings=settings,
        runs=runs,
        name="small",
        quiet=True,
    )
    return runs / "small" / "45" / "3"


def test_a_run_gives_the_features_of_its_weights_on_its_data(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = load("digits_rotated")
    model = build_model("mlp", data.input_shape, 10, width=8, depth=1)
    seen = []
    for candidate in ("live", "ema"):
        out = tmp_path / f"{candidate}.npz"
        features([str(run), "--candidate", candidate, "--out", str(out), "threads=1"])
        model.load_state_dict(load_file(run / "weights" / f"{candidate}.safetensors"))
        found = arrays(out)
        expected = compute(model, data, CPU, "bf16", 512)
        np.testing.assert_allclose(found["X"], expected, rtol=2e-3, atol=1e-4)
        assert str(found["title"]) == f"digits_rotated-ema_basic-{candidate}"
        assert str(found["content"]) == data.fingerprint()
        seen.append(found["X"])
        assert f"hold out 45, seed 3: {candidate} of step" in capsys.readouterr().err
    assert not np.array_equal(*seen)
    features([str(run), "--out", str(tmp_path / "best.npz")])  # what its rule picks
    assert any(np.array_equal(arrays(tmp_path / "best.npz")["X"], x) for x in seen)
    out = tmp_path / "full.npz"
    features([str(run), "--candidate", "ema", "precision=fp32", "--out", str(out)])
    full = arrays(out)["X"]
    assert not np.array_equal(full, seen[1])  # which has the precision of the run
    np.testing.assert_allclose(full, made_by(model, data), rtol=2e-3, atol=1e-4)
    features([str(run), "data.angles=[0,45]", "--out", str(tmp_path / "two.npz")])
    assert arrays(tmp_path / "two.npz")["domains"].tolist() == ["0", "45"]


def test_what_a_run_has_decided_cannot_be_set(run: Path, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "x.npz")]
    for words, message in (
        (
            ["model.width=9"],
            r"^model\.width is as it was in the run; here may be set: data, device",
        ),
        (["model=cnn"], r"^model is as it was in the run"),
        (["--candidate", "sma"], r"no weights of candidate 'sma' in .*; .*Known: live, ema$"),
        (["data=digits_rotated", "data.angels=[0]"], r"no setting 'angels' in data"),
        ([str(run)], r"^features of one run at a time, not of "),
        (["precision=fp8"], r"^precision=fp8: choose one of"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            features([str(run), *words, *out])
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_images_of_another_shape_than_the_runs_are_refused(run: Path, tmp_path: Path) -> None:
    for domain in ("north", "south"):
        folder = tmp_path / "tree" / domain / "cat"
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "0.png")
    words = ["data=folder", f"data.root={tmp_path / 'tree'}", "data.cache=none", "data.size=16"]
    with pytest.raises(UserError, match=r"images of 3×16×16, the run was trained on 1×\d+×\d+;"):
        features([str(run), *words, "--out", str(tmp_path / "x.npz")])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*SMALL], r"required: --out; write dgavg features \[RUN\] \[SETTING=VALUE "),
        ([*SMALL, "--out", "x.npy"], r"^--out x\.npy: write a name that ends in \.npz"),
        ([*SMALL, "--out", "nowhere/x.npz"], r"^--out nowhere/x\.npz: no folder nowhere; make it"),
        ([*SMALL, "--out", "folder.npz"], r"^--out folder\.npz is a folder; name a file in it"),
        (["data=digit", "--out", "x.npz"], r"^no data set 'digit'; did you mean 'digits'"),
        ([*SMALL, "model.widht=1", "--out", "x.npz"], r"^no setting 'widht' in model; did you"),
        ([*SMALL, "--out", "x.npz", "--candidate", "ema"], r"^--candidate ema: of which run\?"),
        (["runs/none", "--out", "x.npz"], r"^no folder runs/none"),
        ([*SMALL, "device=tpu", "--out", "x.npz"], r"tpu"),
        ([*SMALL, "eval_batch_size=0", "--out", "x.npz"], r"^eval_batch_size=0: at least 1"),
        ([*SMALL, "--ou", "x.npz", "--quick"], r"unrecognized arguments: --quick; write dgavg fea"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(UserError, match=message) as caught:
        features(words)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["folder.npz"]


def test_an_interrupted_or_failed_run_leaves_the_old_file(tmp_path: Path) -> None:
    out = tmp_path / "x.npz"
    out.write_bytes(b"old")
    threads = torch.get_num_threads()
    with pytest.raises(UserError):
        features([*SMALL, "model.dropout=2", "--out", str(out)])
    assert out.read_bytes() == b"old"
    features([*SMALL, "threads=2", "--out", str(out)])
    assert arrays(out)["X"].shape == (1797, 8)
    assert torch.get_num_threads() == threads


@pytest.mark.slow
@pytest.mark.skipif(
    not (WEIGHTS.is_file() and STORED.is_file()), reason="no weights or PACS in DGAVG_TEST_DATA"
)
def test_real_features_agree_with_stored_ones(tmp_path: Path) -> None:
    """Photos and art, 20 a class: 112 pixels made 224, against those of the original files."""
    for domain in ("art_painting", "photo"):
        for folder in sorted((REAL / "PACS" / domain).iterdir()):
            (tmp_path / "tree" / domain / folder.name).mkdir(parents=True)
            for file in sorted(folder.iterdir())[:20]:
                (tmp_path / "tree" / domain / folder.name / file.name).symlink_to(file)
    words = ["data=folder", f"data.root={tmp_path / 'tree'}", "data.cache=none", "data.size=224"]
    model = ["model=timm", "model.backbone=tf_efficientnet_lite0", f"model.weights={WEIGHTS}"]
    features([*words, *model, "eval_batch_size=20", "--out", str(tmp_path / "x.npz")])
    found, stored = arrays(tmp_path / "x.npz"), arrays(STORED)
    assert found["X"].shape == (280, 1280)
    for ours, theirs, least in ((0, 0, 0.7), (1, 2, 0.95)):
        rows = stored["d"] == theirs
        x, y = stored["X"][rows].astype(np.float32), stored["y"][rows]
        means = np.stack([x[y == k].mean(0) for k in range(7)])
        means /= np.linalg.norm(means, axis=1, keepdims=True)
        mine = found["d"] == ours
        nearest = (found["X"][mine].astype(np.float32) @ means.T).argmax(1)
        assert (nearest == found["y"][mine]).mean() > least
