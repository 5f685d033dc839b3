"""ARM: the featurizer sees what the images around it are like, too."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dgavg.batch import Batch, Loss
from dgavg.errors import UserError, require
from dgavg.gather import mean
from dgavg.models.model import backbone_of
from dgavg.run import Run
from dgavg.trainer import Trainer, fixed, trainer
from dgavg.trainers.model.inside import featurizer_of, first_features

WIDTH, KERNEL = 64, 5  # of DomainBed's context network


@trainer("arm")
class ARM(Trainer):
    """ARM-CML: a network that adapts to the batch at hand (Zhang et al. 2021, arXiv 2007.02931).

    A context network makes one more channel of every image; its mean over the images of a domain
    in the batch is put beside each of them, and the featurizer reads both. The context network is
    DomainBed's: three 5×5 convolutions, 64 channels, batch norm, trained with the model. It and
    the new channel come after the normalisation of the images. The featurizer's first layer keeps
    its weights; those for the new channel start at 0, so that the model starts as it was (DomainBed
    gives them copies of the other channels' weights, the paper draws them). Where the first layer
    is linear, images are flat: the context network is a perceptron of that width, and the context
    as long as the image.

    At evaluation the context is that of the batch at hand, so a prediction depends on it: batches
    of one domain, `support` rows each, are scored apart. Batch norm that is recalibrated sees
    contexts of batches that mix the training domains.

    - `support` (32): rows that share a context at evaluation; best as many as a domain has in a
      training batch (DomainBed: the same number, 8 for this method).

    Cost: one pass of the context network beside the model's. It works at full image size: at
    224 × 224 it takes more operations than a ResNet-50. Evaluation in small batches is slower, too.

    Avoid: uses that classify one image at a time, or batches that mix domains.
    """

    support: int = fixed(32)

    def validate(self) -> None:
        """Refuse settings out of range."""
        require(self.support >= 1, f"trainer.arm.support={self.support}: at least 1 row")

    def adapt(self, model: nn.Module, domains: int) -> None:
        """Put the context network before the backbone and widen its first layer."""
        featurizer = model.featurizer
        assert isinstance(featurizer, nn.Module)
        backbone = backbone_of(featurizer)
        made = Contextual(backbone, domains)
        if backbone is featurizer:
            model.featurizer = made
        else:
            featurizer.backbone = made
        model.support = self.support  # type: ignore[assignment]  # read by the scorer

    def setup(self, run: Run) -> None:
        """Refuse images that the widened model can't read."""
        try:
            first_features(run)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"arm: with one more channel the model can't read the images ({reason}); use a "
                "model whose first layer reads them as they are"
            ) from error

    def loss(self, run: Run, batch: Batch) -> Loss:
        """The inner loss; say how many domains the batch is of."""
        parts = featurizer_of(run).modules()
        next(m for m in parts if isinstance(m, Contextual)).domains = batch.domains
        return self.inner.loss(run, batch)


class Contextual(nn.Module):
    """Images (N, C, H, W) to features (N, F), by way of a context that rows share.

    In training mode rows are ordered by domain, the same number of each of `domains`, and each
    domain has a context; in evaluation mode all rows have one. Raises `UserError` for a network
    without a layer that could read one more channel.
    """

    def __init__(self, network: nn.Module, domains: int) -> None:
        super().__init__()
        kinds = (nn.Conv2d, nn.Linear)
        first = next((m for m in network.modules() if isinstance(m, kinds)), None)
        if first is None or (isinstance(first, nn.Conv2d) and first.groups != 1):
            raise UserError("arm needs a featurizer that begins with a convolution or linear layer")
        self.flat, self.domains = isinstance(first, nn.Linear), domains  # `loss` keeps it right
        with torch.random.fork_rng(devices=[]):  # nobody else's draws move
            context = _convolutions(first) if isinstance(first, nn.Conv2d) else _perceptron(first)
        self.context = context.to(first.weight.device, first.weight.dtype)
        self.network = network
        _widen(first)

    def forward(self, x: Tensor) -> Tensor:
        """Features of images and their context."""
        x = x.flatten(1) if self.flat else x
        context = self.context(x)
        domains = self.domains if self.training else 1
        by_domain = context.reshape(domains, -1, *context.shape[1:])
        centre = by_domain.mean(dim=1, keepdim=True)
        centre = mean(centre) if self.training else centre  # of the rows of all processes
        shared = centre.expand_as(by_domain).flatten(0, 1)
        features: Tensor = self.network(torch.cat([x, shared.to(x.dtype)], dim=1))
        return features


def _convolutions(first: nn.Conv2d) -> nn.Module:
    def conv(inputs: int, outputs: int) -> nn.Module:
        return nn.Conv2d(inputs, outputs, KERNEL, padding=KERNEL // 2)

    def block(inputs: int) -> list[nn.Module]:
        return [conv(inputs, WIDTH), nn.BatchNorm2d(WIDTH), nn.ReLU()]

    return nn.Sequential(*block(first.in_channels), *block(WIDTH), conv(WIDTH, 1))


def _perceptron(first: nn.Linear) -> nn.Module:
    size = first.in_features

    def block(inputs: int) -> list[nn.Module]:
        return [nn.Linear(inputs, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU()]

    return nn.Sequential(*block(size), *block(WIDTH), nn.Linear(WIDTH, size))


def _widen(layer: nn.Conv2d | nn.Linear) -> None:
    """Give a layer one more input channel, or twice as many inputs, with weights of 0."""
    weight = layer.weight.detach()
    if isinstance(layer, nn.Conv2d):
        new = weight.new_zeros(len(weight), 1, *weight.shape[2:])
        layer.in_channels += 1
    else:
        new = torch.zeros_like(weight)
        layer.in_features *= 2
    layer.weight = nn.Parameter(torch.cat([weight, new], dim=1))
