"""Weights files: what loads, what is refused, and that a refusal leaves the model as it was."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dgavg.errors import UserError
from dgavg.models import Featurizer, Model, build_model, load_weights


class Backbone(nn.Module):
    """A library's backbone in miniature; `head.norm` is its own, any other `head` is not."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.ModuleDict({"norm": nn.Linear(4, 4)})

    def forward(self, x: Tensor) -> Tensor:
        return self.head["norm"](self.bn(self.stem(x)).mean((2, 3)))


def whole(channels: int = 3, classes: int = 2) -> Model:
    mean = [0.5] * channels
    return Model(Featurizer(Backbone(channels), mean, mean), nn.Linear(4, classes))


def library(seed: int = 7) -> dict[str, Tensor]:
    """A state dict as a library publishes it, with its own classifier."""
    torch.manual_seed(seed)
    state = {
        n: torch.rand_like(t) for n, t in Backbone().state_dict().items() if t.is_floating_point()
    }
    state["bn.num_batches_tracked"] = torch.tensor(9)
    for name in ("fc", "classifier", "head.fc", "head_dist", "last_linear"):
        state |= {f"{name}.weight": torch.rand(1000, 4), f"{name}.bias": torch.rand(1000)}
    return state


def own(net: Model) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in net.featurizer.get_submodule("backbone").state_dict().items()}


def assert_has(net: Model, state: dict[str, Tensor]) -> None:
    for name, tensor in own(net).items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0)


def refused(part: nn.Module, path: Path, message: str) -> str:
    """The one line of the refusal; the model must come out of it untouched."""
    before = {n: t.clone() for n, t in part.state_dict().items()}
    with pytest.raises(UserError, match=message) as caught:
        load_weights(part, path)
    for name, tensor in part.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    line = str(caught.value)
    assert "\n" not in line
    assert str(path) in line
    return line


@pytest.mark.parametrize("file", ["w.safetensors", "w.bin", "w.pth", "w.legacy"])
def test_formats_are_told_by_content(file: str, tmp_path: Path) -> None:
    state, path = library(), tmp_path / file
    if file in ("w.safetensors", "w.bin"):
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=file != "w.legacy")
    net = whole()
    head = net.classifier.weight.clone()
    load_weights(net, path)
    assert_has(net, state)
    assert torch.equal(net.classifier.weight, head)


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_nested_state_dicts(key: str, tmp_path: Path) -> None:
    net, state = whole(), library()
    torch.save({"epoch": 3, key: state}, tmp_path / "w.pt")
    load_weights(net, tmp_path / "w.pt")
    assert_has(net, state)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_prefixes_of_wrapped_models_are_dropped(prefix: str, tmp_path: Path) -> None:
    net, state = whole(), library()
    torch.save({prefix + n: t for n, t in state.items()}, tmp_path / "w.pt")
    load_weights(net, tmp_path / "w.pt")
    assert_has(net, state)


@pytest.mark.parametrize("part", ["model", "featurizer", "backbone"])
@pytest.mark.parametrize("saved", ["library", "dgavg"])
def test_any_part_takes_any_file(part: str, saved: str, tmp_path: Path) -> None:
    donor, net = whole(), whole()
    load_state = library()
    torch.save(load_state, tmp_path / "library.pt")
    load_weights(donor, tmp_path / "library.pt")
    torch.save(donor.state_dict(), tmp_path / "dgavg.pt")
    target = {
        "model": net,
        "featurizer": net.featurizer,
        "backbone": net.featurizer.get_submodule("backbone"),
    }[part]
    load_weights(target, tmp_path / f"{saved}.pt")
    assert_has(net, load_state)
    copied = torch.equal(net.classifier.weight, donor.classifier.weight)
    assert copied == (part == "model" and saved == "dgavg")


def test_a_whole_model_comes_back(tmp_path: Path) -> None:
    donor, net = (build_model("cnn", (1, 8, 8), 3) for _ in range(2))
    save_file(donor.state_dict(), tmp_path / "swad.safetensors")
    load_weights(net, tmp_path / "swad.safetensors")
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(net(x), donor(x), rtol=0, atol=0)
    line = refused(build_model("cnn", (1, 8, 8), 4), tmp_path / "swad.safetensors", "do not fit")
    assert "2 of another shape (classifier.weight 3×128 for 4×128, classifier.bias 3 for 4)" in line


def test_weights_are_written_in_place(tmp_path: Path) -> None:
    net, state = whole(), library()
    torch.save({n: t.double() for n, t in state.items()}, tmp_path / "w.pt")
    before = {n: (t.data_ptr(), t.dtype) for n, t in net.state_dict().items()}
    load_weights(net, tmp_path / "w.pt")
    assert {n: (t.data_ptr(), t.dtype) for n, t in net.state_dict().items()} == before
    assert all(p.requires_grad and p.grad_fn is None for p in net.parameters())
    assert_has(net, state)


def test_old_files_without_batch_counts(tmp_path: Path) -> None:
    net, state = whole(), library()
    del state["bn.num_batches_tracked"]
    torch.save(state, tmp_path / "w.pt")
    load_weights(net, tmp_path / "w.pt")
    assert_has(net, state | {"bn.num_batches_tracked": torch.tensor(0)})


def test_whatever_does_not_fit_is_listed_and_nothing_is_loaded(tmp_path: Path) -> None:
    state = library()
    del state["bn.weight"], state["head.norm.bias"]
    state["stem.weight"] = torch.rand(4, 3, 5, 5)
    state |= {f"extra.{i}": torch.rand(1) for i in range(5)}
    torch.save(state, tmp_path / "w.pt")
    line = refused(whole(), tmp_path / "w.pt", "do not fit this model.*nothing was loaded")
    assert "2 missing (bn.weight, head.norm.bias)" in line
    assert "5 unexpected (extra.0, extra.1, extra.2 and 2 more)" in line
    assert "1 of another shape (stem.weight 4×3×5×5 for 4×3×3×3)" in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bn.bias": None}, r"1 missing \(bn\.bias\); nothing"),
        ({"head.norm.weight": None}, r"1 missing \(head\.norm\.weight\); nothing"),
        ({"neck.weight": torch.rand(2)}, r"1 unexpected \(neck\.weight\); nothing"),
        ({"bn.bias": torch.tensor(1.0)}, r"1 of another shape \(bn\.bias scalar for 4\); nothing"),
    ],
)
def test_one_wrong_name_is_enough(
    change: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    state = {n: t for n, t in (library() | change).items() if t is not None}
    torch.save(state, tmp_path / "w.pt")
    refused(whole(), tmp_path / "w.pt", message)


def test_three_channels_are_spread_only_where_asked(tmp_path: Path) -> None:
    state = library()
    torch.save(state, tmp_path / "w.pt")
    refused(whole(channels=2), tmp_path / "w.pt", r"stem\.weight 4×3×3×3 for 4×2×3×3")
    stem = state["stem.weight"]
    for channels, first_conv in ((1, "stem"), (2, ["stem", "absent"]), (3, "stem")):
        net = whole(channels)
        load_weights(net, tmp_path / "w.pt", first_conv=first_conv)
        ours = own(net)["stem.weight"]
        if channels == 3:
            assert torch.equal(ours, stem)
        else:
            for c in range(channels):
                torch.testing.assert_close(ours[:, c], stem.mean(1) * 3 / channels)


def test_first_layers_that_cannot_be_spread_are_refused_like_any_other(tmp_path: Path) -> None:
    path, state = tmp_path / "w.pt", library()

    def refusal(first_conv: str) -> str:
        with pytest.raises(UserError) as caught:
            load_weights(whole(channels=2), path, first_conv)
        return str(caught.value)

    torch.save(state | {"stem.weight": torch.rand(4, 5, 3, 3)}, path)
    assert "1 of another shape (stem.weight 4×5×3×3 for 4×2×3×3)" in refusal("stem")
    torch.save(state | {"extra.weight": torch.rand(4, 3, 3, 3)}, path)
    assert "1 unexpected (extra.weight), 1 of another shape" in refusal("extra")
    del state["stem.weight"]
    torch.save(state, path)
    assert "1 missing (stem.weight); nothing" in refusal("stem")


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    net, state = whole(), library()
    path = tmp_path / "w.pt"
    refused(net, path, "^no weights file")
    refused(net, tmp_path, "^no weights file")

    path.write_bytes(b"")
    refused(net, path, "cannot read the weights file")
    path.write_text("not weights at all, but long enough for a header")
    refused(net, path, "cannot read the weights file")
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-200])
    refused(net, path, "cannot read the weights file")

    for content in ({}, [torch.rand(2)], {"epoch": 3}, {"model": {"a": 1}}, {1: torch.rand(2)}):
        torch.save(content, path)
        refused(net, path, "holds no state dict")

    path = tmp_path / "w.safetensors"
    save_file(state, path)
    path.write_bytes(path.read_bytes()[:-1])
    refused(net, path, "cannot read the weights file")


def test_code_in_a_file_is_never_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    with (tmp_path / "w.pt").open("wb") as file:
        pickle.dump({"stem.weight": Trap()}, file)
    torch.save({"stem.weight": Trap()}, tmp_path / "zip.pt")
    for name in ("w.pt", "zip.pt"):
        refused(whole(), tmp_path / name, "pickled code, which is never run")
    assert not (tmp_path / "sprung").exists()


def test_two_names_that_become_one_are_refused(tmp_path: Path) -> None:
    state = library()
    torch.save(state | {f"module.{n}": t for n, t in state.items()}, tmp_path / "w.pt")
    refused(whole(), tmp_path / "w.pt", "names that differ only in")


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    net, state = whole(), library()
    torch.save(state, tmp_path / "w.pt")
    load_weights(net, "~/w.pt")
    assert_has(net, state)
