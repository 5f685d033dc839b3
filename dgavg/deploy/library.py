"""A model as timm or torchvision know it: their constructor, their names, their classifier."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dgavg.deploy.saved import Saved
from dgavg.errors import UserError, require
from dgavg.models.model import Model, Normalize, backbone_of
from dgavg.trainers.model.arm import Contextual

LIBRARIES = ("timm", "torchvision")
TOLERANCE = 1e-4
SUPPORT = 4  # images to compare on


@dataclass(frozen=True, eq=False)
class Native:
    """How a library builds a model and what it then loads, strictly.

    `architecture` and `arguments` (with `num_classes`) are its constructor's, `weights` are in its
    names, `settings` are what it knows of the model beside.
    """

    library: str
    architecture: str
    arguments: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    settings: Mapping[str, Any]
    features: int


def library_of(run: Saved) -> str | None:
    """The library that the backbone comes from, if it is one of `LIBRARIES`."""
    found = type(_backbone(run)).__module__.partition(".")[0]
    return found if found in LIBRARIES else None


def _backbone(run: Saved) -> nn.Module:
    found = backbone_of(run.model.featurizer)
    return found.network if isinstance(found, Contextual) else found


def adapted_by(run: Saved) -> list[str]:
    """The links that changed the model."""
    return list(getattr(run.model, "adapted", None) or [])


def normalisation(run: Saved) -> tuple[list[float], list[float]]:
    """Mean and standard deviation by channel, of pixels in [0, 1]; 0 and 1 where there are none."""
    for module in run.model.featurizer.modules():
        if isinstance(module, Normalize):
            # float32 0.485 is 0.48500001430511475; what was written has few digits
            mean, std = (round_(t) for t in (module.mean, module.std))
            return mean, std
    return [0.0] * run.input_shape[0], [1.0] * run.input_shape[0]


def round_(values: Tensor) -> list[float]:
    """The shortest numbers that are these in float32."""
    return [float(f"{v:.7g}") for v in values.flatten().tolist()]


def native(run: Saved, library: str) -> Native:
    """The model for a library's own constructor, checked: strict names and equal outputs.

    Raises `UserError` where the library can't hold it, with what to write instead.
    """
    own, instead = library_of(run), "write --torch-export for a program that needs no library"
    name = _architecture(run)
    require(own == library, f"the model, {name!r}, is not {library}'s; {instead}")
    links = adapted_by(run)
    require(
        not links,
        f"{' and '.join(links)} changed the model, which plain {library} can't build; {instead}",
    )
    net, linear = _backbone(run), _linear(run.model, instead)
    build, arguments = BUILDERS[library](run, net, name)
    with torch.random.fork_rng(devices=[]):
        made = build(num_classes=len(run.classes), **arguments).eval()
    weights = _with_head(made, net, linear)
    refusal = f"plain {library} can't hold this {name!r}"
    try:
        made.load_state_dict(weights)
        difference = _difference(run, made)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{refusal}: {reason}; {instead}") from error
    require(
        difference <= TOLERANCE,
        f"{refusal}: its outputs differ by {difference:.2g}; {instead}",
    )
    return Native(
        library=library,
        architecture=name,
        arguments={"num_classes": len(run.classes), **arguments},
        weights=weights,
        settings=dict(getattr(made, "pretrained_cfg", None) or {}),
        features=linear.in_features,
    )


def _architecture(run: Saved) -> str:
    """The library's name of the backbone, without a tag of weights."""
    settings = run.config["model"]
    if settings["name"] == "domainbed":  # which model that is, its builder decides
        return "resnet18" if settings["resnet18"] else "resnet50"
    return str(settings.get("backbone", settings["name"])).partition(".")[0]


def _linear(model: Model, instead: str) -> nn.Linear:
    """The one layer of the classifier that has weights; dropout beside it is none."""
    found = [m for m in model.classifier.modules() if next(m.parameters(False), None) is not None]
    if len(found) != 1 or not isinstance(found[0], nn.Linear):
        raise UserError(f"the classifier is more than one linear layer; {instead}")
    return found[0]


def _with_head(made: nn.Module, net: nn.Module, linear: nn.Linear) -> dict[str, Tensor]:
    """The backbone's tensors under its own names, and the classifier's under the library's.

    What a library's model has beyond its backbone is its head, or several that it averages.
    """
    own, head = net.state_dict(), linear.state_dict()
    weights = {}
    for name, tensor in made.state_dict().items():
        kind = name.rpartition(".")[2]
        found = own.get(name, head.get(kind) if name not in own else None)
        if found is not None:
            same = found.numel() == tensor.numel()  # a head may be a 1×1 convolution
            weights[name] = found.reshape(tensor.shape) if same else found
    return {k: v.detach().cpu().clone() for k, v in weights.items()}


@torch.no_grad()
def _difference(run: Saved, made: nn.Module) -> float:
    """The largest difference of the outputs on random images."""
    images = random_images(run, SUPPORT)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in normalisation(run))
    return largest_difference(made((images - mean) / std), run.model(images))


def random_images(run: Saved, n: int) -> Tensor:
    """Images (n, C, H, W) in [0, 1], always the same."""
    return torch.rand(n, *run.input_shape, generator=torch.Generator().manual_seed(0))


def largest_difference(found: Tensor, wanted: Tensor) -> float:
    """Between logits, in units of the largest of `wanted` where that is above 1."""
    require(found.shape == wanted.shape, f"outputs of shape {tuple(found.shape)}")
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1))


def _timm(run: Saved, net: Any, name: str) -> tuple[Callable[..., nn.Module], dict[str, Any]]:
    import timm

    arguments: dict[str, Any] = {}
    if run.input_shape[0] != 3:
        arguments["in_chans"] = run.input_shape[0]
    if net.pretrained_cfg.get("fixed_input_size", False):
        arguments["img_size"] = list(run.input_shape[1:])

    def build(**kwargs: Any) -> nn.Module:
        made: nn.Module = timm.create_model(name, **kwargs)
        return made

    return build, arguments


def _torchvision(
    run: Saved, net: Any, name: str
) -> tuple[Callable[..., nn.Module], dict[str, Any]]:
    import torchvision

    arguments: dict[str, Any] = {}
    if name.startswith("vit_"):
        arguments["image_size"] = net.image_size
    if name.startswith("maxvit_"):
        arguments["input_size"] = list(run.input_shape[1:])
    if hasattr(net, "aux_logits"):
        arguments |= {"aux_logits": False, "init_weights": False}

    def build(**kwargs: Any) -> nn.Module:
        made: nn.Module = torchvision.models.get_model(name, **kwargs)
        return made

    return build, arguments


BUILDERS: dict[str, Callable[[Saved, Any, str], tuple[Callable[..., nn.Module], dict[str, Any]]]]
BUILDERS = {"timm": _timm, "torchvision": _torchvision}
