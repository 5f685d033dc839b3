"""MIRO: the features shall still tell what the start weights' features tell."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgavg.batch import Batch, Loss
from dgavg.errors import require, unknown
from dgavg.gather import mean
from dgavg.run import Run
from dgavg.trainer import Trainer, fixed, trainer
from dgavg.trainers.loss.checks import check_weight
from dgavg.trainers.model.inside import featurizer_of

INITIAL, SMALLEST = 0.1, 1e-5  # of the variances
STAGES = tuple(f"layer{i}" for i in (1, 2, 3, 4))


@trainer("miro")
class MIRO(Trainer):
    """MIRO: features stay informative of those at the start (Cha et al. 2022, arXiv 2203.10789).

    Adds weight · Σ over layers of mean [(f − f₀)² / v + log v] / 2, where f is what a layer gives,
    f₀ what it gives with the weights that training started from, and v > 0 a learned number for
    each channel: v = softplus(b) + 1e-5, 0.1 at the start. The paper has an encoder for the mean
    too; here, as in its code, it is the identity. The start weights are frozen and work in
    evaluation mode, with the running statistics they came with; the paper's own runs freeze batch
    norm on both sides.

    - `weight` (0.1; usual 0.001 to 1).
    - `layers` (none: `layer1` to `layer4` of a ResNet, else what timm names as the stages of a
      backbone, else the features): names of modules in the featurizer, such as
      `featurizer.backbone.layer1`; `featurizer` is the features. The paper's code has a ResNet's
      stem as well. A channel is the second axis of a layer's output, of three axes the last.
    - `lr_factor` (10): the learning rate of the variances, as a multiple of the run's.

    Cost: one more forward pass, without gradients. One more copy of the featurizer, and what its
    layers give until the penalty is taken.

    Avoid: start weights that know nothing: with random ones it holds on to noise. Images that are
    blended or cut are compared as they are.
    """

    weight: float = 0.1
    layers: list[str] | None = None
    lr_factor: float = fixed(10.0)

    def validate(self) -> None:
        """Refuse settings out of range."""
        check_weight("miro", self.weight)
        require(self.lr_factor > 0, f"trainer.miro.lr_factor={self.lr_factor}: a number above 0")

    def module(self, run: Run) -> nn.Module:
        """The frozen featurizer, and the variances of each layer."""
        return Anchor(featurizer_of(run), self.layers, run.batches(0).x[:1].to(run.device))

    def setup(self, run: Run) -> None:
        """Set the learning rate of the variances."""
        run.scale_lr("miro", self.lr_factor)

    def loss(self, run: Run, batch: Batch) -> Loss:
        """Add the penalty on what the layers give in the one forward pass."""
        anchor = run.extras["miro"]
        assert isinstance(anchor, Anchor)
        with recorded(featurizer_of(run), anchor.names) as live:
            out = self.inner.loss(run, batch)
        with run.autocast():
            start = anchor(batch.x)
        out.terms["miro"] = self.weight * mean(penalty(live, start, anchor.variances()))
        return out


class Anchor(nn.Module):
    """The featurizer as it was at the start, never trained, and a variance for each channel.

    `names` are those of the layers within the featurizer, "" for all of it; `image` (1, ...) one
    input, to see their sizes. Raises `UserError` for a layer that does not exist.
    """

    def __init__(self, featurizer: nn.Module, layers: Sequence[str] | None, image: Tensor) -> None:
        super().__init__()
        self.names = _found(featurizer) if layers is None else _named(featurizer, layers)
        self.start = copy.deepcopy(featurizer).requires_grad_(False).eval()
        inverse = math.log(math.expm1(INITIAL - SMALLEST))  # of softplus
        self.biases = nn.ParameterList(
            torch.full(_channels(layer), inverse) for layer in self(image)
        )

    def train(self, mode: bool = True) -> Anchor:
        """The frozen part stays in evaluation mode."""
        super().train(mode)
        self.start.eval()
        return self

    @torch.no_grad()
    def forward(self, x: Tensor) -> list[Tensor]:
        """What each layer gives with the start weights."""
        with recorded(self.start, self.names) as found:
            self.start(x)
        return found

    def variances(self) -> list[Tensor]:
        """The variance of each layer's channels, of a shape that broadcasts over its output."""
        return [F.softplus(bias) + SMALLEST for bias in self.biases]


def penalty(live: Sequence[Tensor], start: Sequence[Tensor], variances: Sequence[Tensor]) -> Tensor:
    """Σ over layers of the mean of [(f − f₀)² / v + log v] / 2; a scalar."""
    terms = []
    for now, then, variance in zip(live, start, variances, strict=True):
        wide = torch.promote_types(now.dtype, torch.float32)
        apart = (now.to(wide) - then.to(wide)).square() / variance
        terms.append((apart.mean() + variance.log().mean()) / 2)
    return torch.stack(terms).sum()


@contextmanager
def recorded(featurizer: nn.Module, names: Sequence[str]) -> Iterator[list[Tensor]]:
    """Inside, what the first pass through `featurizer` gives at `names`; left as it was after.

    The list is filled when the block ends. Raises `UserError` for a layer that gave no features.
    """
    kept: dict[str, Tensor] = {}
    found: list[Tensor] = []
    with ExitStack() as stack:
        for name in names:

            def keep(module: nn.Module, inputs: object, output: Tensor, name: str = name) -> None:
                kept.setdefault(name, output)

            hook = featurizer.get_submodule(name).register_forward_hook(keep)
            stack.callback(hook.remove)
        yield found
    for name in names:
        output = kept.get(name)
        require(
            isinstance(output, Tensor) and output.dim() > 1,
            f"trainer.miro.layers: {'.'.join(['featurizer', name]).rstrip('.')!r} gives no tensor "
            "(N, C, ...) in a forward pass; name a layer that does",
        )
        found.append(kept[name])


def _channels(output: Tensor) -> list[int]:
    """The shape of one number a channel, for an output (1, C, ...) or (1, tokens, C)."""
    axis = 2 if output.dim() == 3 else 1
    return [size if i == axis else 1 for i, size in enumerate(output.shape)]


def _named(featurizer: nn.Module, layers: Sequence[str]) -> list[str]:
    """Names in the model as names in the featurizer."""
    known = ["featurizer" + "." * bool(name) + name for name, _ in featurizer.named_modules()]
    require(len(layers) > 0, "trainer.miro.layers=[]: name a layer, or null for the usual ones")
    for layer in layers:
        if layer not in known:
            raise unknown("layer", layer, known, "trainer.miro.layers")
    require(len(set(layers)) == len(layers), f"trainer.miro.layers={layers}: a layer twice")
    return [layer.removeprefix("featurizer").removeprefix(".") for layer in layers]


def _found(featurizer: nn.Module) -> list[str]:
    """The stages of a ResNet or of a backbone that timm knows; else the featurizer itself."""
    for prefix, module in featurizer.named_modules():
        stages = [*STAGES] if all(hasattr(module, stage) for stage in STAGES) else _timm(module)
        if stages:
            return [f"{prefix}.{stage}".removeprefix(".") for stage in stages]
    return [""]


def _timm(module: nn.Module) -> list[str]:
    """The stages of a timm backbone, where their channels are where we look for them."""
    inside = dict(module.named_modules())
    listed = getattr(module, "feature_info", None)
    if not isinstance(listed, list) or getattr(module, "output_fmt", "NCHW") != "NCHW":
        return []
    names = [entry.get("module", "") for entry in listed]
    return [name for name in names if name in inside and name]
