"""`dgavg features`: what a featurizer makes of a data set, into a file for `data=features`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import OmegaConf
from torch import Tensor

from dgavg.benchmark.checks import check_choices, find_device
from dgavg.benchmark.fold import threads_for
from dgavg.benchmark.rebuild import composed_like
from dgavg.commands.say import Parser, tell
from dgavg.config import compose, explained, plain
from dgavg.data import DomainDataset, load
from dgavg.data.decode import shown
from dgavg.data.domains import as_floats
from dgavg.data.features import write_features
from dgavg.deploy.saved import Saved, load_run
from dgavg.errors import require
from dgavg.models import Model, build_model
from dgavg.run import autocast
from dgavg.seeding import seed_everything

USE = "dgavg features [RUN] [SETTING=VALUE ...] --out FEATURES.npz [--candidate NAME]"
OF_A_RUN = ("device", "precision", "threads", "eval_batch_size")  # what may be set with one


def features(arguments: list[str]) -> None:
    """Write the features of a data set, from a model's featurizer, for data=features."""
    parser = Parser("features", features.__doc__, f"write {USE}")
    parser.add_argument(
        "words",
        nargs="*",
        metavar="RUN | SETTING=VALUE",
        help="data=..., model=..., device=..., or the folder of a run, runs/NAME/HELD-OUT/SEED, "
        "whose model and data are taken",
    )
    parser.add_argument("--out", type=Path, required=True, help="the file to write, .npz")
    parser.add_argument(
        "--candidate", help="which weights of the run (default: what its rule picks over all)"
    )
    options = parser.parse_intermixed_args(arguments)
    runs = [word for word in options.words if "=" not in word or Path(word).is_dir()]
    overrides = [word for word in options.words if word not in runs]
    require(len(runs) <= 1, f"features of one run at a time, not of {', '.join(runs)}; write {USE}")
    require(
        options.candidate is None or bool(runs),
        f"--candidate {options.candidate}: of which run? Write {USE}",
    )
    _check_out(options.out)
    saved = load_run(runs[0], options.candidate) if runs else None
    settings = _composed(overrides) if saved is None else _of_run(saved, overrides)
    check_choices(settings, settings["protocol"])
    device = find_device(settings["device"])
    data = dict(settings["data"])
    dataset = load(data.pop("name"), **data)
    tell(*dataset.notes)
    if saved is None:
        model, title = _built(settings, dataset), _label(settings["model"])
    else:
        model, title = _trained(saved, dataset), f"{saved.record['chain']}-{saved.candidate}"
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(settings["threads"] or threads_for(model))
        size, precision = settings["eval_batch_size"], settings["precision"]
        found = compute(model.to(device), dataset, device, precision, size, title="features")
    finally:
        torch.set_num_threads(threads)
    title = f"{dataset.name}-{title}"
    rows = [len(domain) for domain in dataset.domains]
    write_features(
        options.out,
        found,
        torch.cat([domain.labels for domain in dataset.domains]).numpy(),
        np.repeat(np.arange(len(rows)), rows),
        dataset.names,
        dataset.classes,
        title,
        dataset.fingerprint(),
        train=_official(dataset),
    )
    n, width = found.shape
    print(f"{options.out}: {n} × {width} features, {title}; use data=features data.file=FILE")


@torch.no_grad()
def compute(
    model: Model,
    dataset: DomainDataset,
    device: torch.device,
    precision: str = "fp32",
    batch_size: int = 64,
    *,
    title: str = "",
) -> NDArray[np.float16]:
    """What the featurizer, in evaluation mode, makes of every image, un-augmented.

    Shape (N, F), domain after domain, in the order of their images. A batch is of one domain, and
    of as many rows as the model's predictions depend on, where they depend on the batch. With a
    `title` a bar on standard error shows how far it is, where that is a terminal.

    Raises `UserError` for features that float16 can't hold.
    """
    model.eval()
    size = getattr(model, "support", None) or batch_size
    total = sum(-(-len(domain) // size) for domain in dataset.domains)
    found = []
    for name, images in shown(_batches(dataset, size), total, title):
        with autocast(precision, device):
            made: Tensor = model.featurizer(as_floats(images.to(device)))
        part = made.to(torch.float16).cpu()
        require(
            bool(part.isfinite().all()),
            f"features of domain {name!r} are not finite in float16, which ends at 65504; write "
            "precision=fp32 or another model",
        )
        found.append(part)
    return torch.cat(found).numpy()


def _batches(dataset: DomainDataset, size: int) -> Iterator[tuple[str, Tensor]]:
    for domain in dataset.domains:
        for images in torch.split(domain.images, size):
            yield domain.name, images


def _check_out(out: Path) -> None:
    require(out.suffix == ".npz", f"--out {out}: write a name that ends in .npz")
    require(not out.is_dir(), f"--out {out} is a folder; name a file in it")
    require(out.parent.is_dir(), f"--out {out}: no folder {out.parent}; make it first")


def _composed(overrides: Sequence[str]) -> dict[str, Any]:
    with explained():
        return plain(compose(overrides))


def _of_run(saved: Saved, overrides: Sequence[str]) -> dict[str, Any]:
    """The settings of a run, its data among them unless other data are named.

    Raises `UserError` for a setting that the run has decided.
    """
    given = {word.lstrip("+~").partition("=")[0] for word in overrides}
    for name in given:
        require(
            name in OF_A_RUN or name.partition(".")[0] == "data",
            f"{name} is as it was in the run; here may be set: data, {', '.join(OF_A_RUN)}",
        )
    own: Mapping[str, Any] = saved.config["data"]
    with explained():
        config = compose(overrides) if "data" in given else composed_like(own, overrides)
        for key in ("precision", "eval_batch_size"):
            if key not in given:
                OmegaConf.update(config, key, saved.config[key])
        return plain(config)


def _built(settings: Mapping[str, Any], dataset: DomainDataset) -> Model:
    """The model of the settings; its random weights, if any, are those of `init_seed`."""
    if settings["model"].get("weights") is None:
        tell("no pretrained weights (model.weights): features of random ones")
    seed_everything(settings["init_seed"] or 0)
    return build_model(
        input_shape=dataset.input_shape, classes=len(dataset.classes), **settings["model"]
    )


def _trained(saved: Saved, dataset: DomainDataset) -> Model:
    require(
        dataset.input_shape == saved.input_shape,
        f"{dataset.name} has images of {_shape(dataset.input_shape)}, the run was trained on "
        f"{_shape(saved.input_shape)}; set data.size to that",
    )
    tell(saved.checkpoint)
    return saved.model


def _label(model: Mapping[str, Any]) -> str:
    return str(model.get("backbone") or model["name"])


def _official(dataset: DomainDataset) -> NDArray[np.bool_] | None:
    """Which rows the official lists train on; the file takes the rest for the validation part.

    None without such lists, and with lists that don't test on all rows, which no file can say.
    """
    lists = dataset.official
    if lists is None:
        return None
    train, left = [], 0
    for i, domain in enumerate(dataset.domains):
        if lists.test is None or len(lists.test[i]) < len(domain):
            tell(f"official lists of {domain.name} don't test on all images: left out of the file")
            return None
        train.append(np.zeros(len(domain), dtype=np.bool_))
        train[i][lists.in_[i]] = True
        left += len(domain) - len(lists.in_[i]) - len(lists.out[i])
    if left:
        tell(f"official lists: {left} image(s) in neither go to the validation part")
    return np.concatenate(train)


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))
