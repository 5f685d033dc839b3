"""MixStyle: mix the styles of feature maps within the network."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dgavg.distributed import rank
from dgavg.errors import UserError, require
from dgavg.run import Run
from dgavg.trainer import Trainer, trainer
from dgavg.trainers.batch.blocks import default_blocks, find_block
from dgavg.trainers.batch.partners import partners

MIXES = ("random", "crossdomain")
EPSILON = 1e-6


@trainer("mixstyle", one_domain="mix=random")
class MixStyle(Trainer):
    """MixStyle: mixes mean and deviation of feature maps (Zhou et al. 2021, arXiv 2104.02008).

    After each of the named blocks, in a share p of the steps: (x − μ(x))/σ(x) · σ' + μ', where
    μ' = λμ(x) + (1 − λ)μ(x̃), σ' likewise, x̃ another row, λ ~ Beta(alpha, alpha) one a row; mean
    and deviation are those of each map over its pixels, and no gradient flows through them. Labels
    stay. As in the authors' code one coin decides for the whole batch and block. Their code for
    partners of another domain swaps two halves of a batch of two domains; here they are the rows,
    in random order, of the next domain in a random cycle of all. Nothing is mixed in evaluation
    mode, and never in the copies of the model that candidates are scored on.

    - `layers` (layer1 and layer2 of a ResNet): blocks by name, such as
      `[featurizer.backbone.layer1]`, or `input` for the images themselves. Blocks near the
      classifier do harm: their statistics tell the classes.
    - `p` (0.5; usual 0.1 to 0.9): the chance of a block to mix in a step.
    - `alpha` (0.1; usual 0.1 to 0.3): near 0 a style is kept or taken over, at 1 any λ alike.
    - `mix` (random): partners are any rows; `crossdomain` takes them from another domain.

    Cost: no pass, one more copy of the named blocks' outputs.

    Avoid: Where style tells the class, as colour may, and for networks without maps, such as an
    MLP or a transformer.
    """

    layers: list[str] | None = None
    p: float = 0.5
    alpha: float = 0.1
    mix: str = "random"

    @property
    def min_domains(self) -> int:  # type: ignore[override]  # of other links a constant
        """Two domains where partners are of another one."""
        return 2 if self.mix == "crossdomain" else 1

    def validate(self) -> None:
        """Refuse settings out of range."""
        where, layers = "trainer.mixstyle", self.layers
        require(
            layers is None or (len(layers) > 0 and len(set(layers)) == len(layers)),
            f"{where}.layers={layers}: names of blocks, each once",
        )
        require(0 <= self.p <= 1, f"{where}.p={self.p}: a number from 0 to 1")
        require(self.alpha > 0, f"{where}.alpha={self.alpha}: a number above 0")
        require(self.mix in MIXES, f"{where}.mix={self.mix}: choose one of {', '.join(MIXES)}")

    def setup(self, run: Run) -> None:
        """Find the blocks and hook into them; refuse names that the model does not have."""
        setting = "trainer.mixstyle.layers"
        layers = default_blocks(run.model, ("layer1", "layer2")) if self.layers is None else []
        require(
            bool(self.layers or layers),
            f"{setting}: {type(run.model).__name__} has no layer1 and layer2 as a ResNet has; name "
            "the blocks whose outputs are mixed, or write [input]",
        )
        names = self.layers or layers
        blocks = {name: find_block(run.model, name, setting) for name in names if name != "input"}
        for name, block in blocks.items():
            block.register_forward_hook(Mixer(run, name))
        if "input" in names:
            featurizer = find_block(run.model, "featurizer", setting)
            featurizer.register_forward_pre_hook(Mixer(run, "input"))


class Mixer:
    """A hook that mixes styles in what a block gives, or in the images that the featurizer takes.

    It acts in training alone: not in evaluation mode, nor where no gradient is taken, as when
    batch-norm statistics are recalibrated. A copy of the model, pickled ones too, has a hook that
    does nothing; no run lives on in the hooks of its model.
    """

    def __init__(self, run: Run, layer: str) -> None:
        self.run, self.layer = weakref.ref(run), layer

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return _idle_hook, ()

    def __call__(self, block: nn.Module, inputs: tuple[Any, ...], *output: Any) -> Any:
        """What the block gives instead of `output`; before the block, what it takes instead."""
        run = self.run()
        if run is None or not block.training or not torch.is_grad_enabled():
            return None
        given = output[0] if output else inputs[0]
        if not isinstance(given, Tensor) or given.dim() < 4 or given[0, 0].numel() < 2:
            what = f"of shape {tuple(given.shape)}" if isinstance(given, Tensor) else "no tensor"
            raise UserError(
                f"trainer.mixstyle.layers: {self.layer} is {what}; styles are those of maps "
                "(N, C, H, W) of several pixels"
            )
        link = next(k for k in run.trainer if isinstance(k, MixStyle))
        random, n, domains = run.random(f"mixstyle.{self.layer}"), len(given), len(run.names)
        if random.random() >= link.p:
            return None
        if rank():  # other partners in each process, but one coin for all
            random = run.random(f"mixstyle.{self.layer}.{rank()}")
        if link.mix == "crossdomain":
            partner = partners(random, n, domains, across=True, shuffled=True)
        else:
            partner = torch.from_numpy(random.permutation(n))
        share = torch.from_numpy(random.beta(link.alpha, link.alpha, n))
        there = (t.to(given.device, non_blocking=True) for t in (partner, share))
        return restyled(given, *there)


def _idle_hook() -> Callable[..., None]:
    return _nothing


def _nothing(*args: Any) -> None:
    """The hook of a copy."""


def restyled(x: Tensor, partner: Tensor, share: Tensor) -> Tensor:
    """`x` (N, C, H, W) with mean and deviation of each map mixed with those of its partner's.

    `partner` (N,) is a row of each row, `share` (N,) how much stays its own. All is reckoned
    in float32 at least.
    """
    with torch.no_grad():
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(wide, dim=tuple(range(2, x.dim())), keepdim=True)
        deviation = (variance + EPSILON).sqrt()
        own = share.to(mean).view(-1, *[1] * (x.dim() - 1))
        to_mean, to_deviation = (torch.lerp(s[partner], s, own) for s in (mean, deviation))
        scale = to_deviation / deviation
    return torch.addcmul(to_mean, x - mean, scale).to(x.dtype)
