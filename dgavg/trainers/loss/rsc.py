"""RSC: train without the features that the prediction rests on most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dgavg.batch import Batch, Loss
from dgavg.errors import require
from dgavg.run import Run
from dgavg.trainer import Trainer, trainer
from dgavg.trainers.gradient.passes import statistics_kept


@trainer("rsc")
class RSC(Trainer):
    """RSC: mutes the features a prediction rests on most (Huang et al. 2020, arXiv 2007.02454).

    Takes the slope g of the true label's logit in the features φ. In each row, the features whose g
    is at or above the (1 − f_drop) quantile are set to 0; of all rows, only those are muted where
    that lowers the true label's probability most, at or above its (1 − b_drop) quantile. The risks
    are those of the muted features, and so are the logits and features that links outside this one
    see; links inside see the whole. This is DomainBed's RSC, to the quantiles between two values:
    ties at a quantile are all muted. The paper mutes channels or places of the last maps, by a
    coin; DomainBed and this link mute features after pooling.

    - `f_drop` (1/3; usual 0 to 0.5): the share of features; 0 is no RSC at all.
    - `b_drop` (1/3; usual 0 to 0.5): the share of rows; 0 is no RSC at all.

    Cost: no pass of the featurizer; three more of the classifier, one of them back.

    Avoid: Small featurizers: with few features, a third of them may be all that tells the classes.
    """

    f_drop: float = 1 / 3
    b_drop: float = 1 / 3

    def validate(self) -> None:
        """Refuse settings out of range."""
        require(
            0 <= self.f_drop < 1, f"trainer.rsc.f_drop={self.f_drop}: a number from 0 to below 1"
        )
        require(0 <= self.b_drop <= 1, f"trainer.rsc.b_drop={self.b_drop}: a number from 0 to 1")

    def loss(self, run: Run, batch: Batch) -> Loss:
        """The loss on the muted features; running statistics are those of the first pass."""
        out = self.inner.loss(run, batch)
        if self.f_drop == 0 or self.b_drop == 0:
            return out
        classifier: Callable[[Tensor], Tensor] = run.model.classifier  # type: ignore[assignment]
        dtype = next(iter(run.parameters)).dtype  # features came as float32

        def head(features: Tensor) -> Tensor:
            return classifier(features.to(dtype)).float()

        with statistics_kept(run):
            kept = kept_features(head, out.features, out.batch.y, self.f_drop, self.b_drop)
            features = out.features * kept
            with run.autocast():
                logits = head(features).float()
        errors = F.cross_entropy(logits, out.batch.y, reduction="none")
        risks = batch.by_domain(errors).mean(dim=1)
        return replace(out, risks=risks, logits=logits, features=features)


def kept_features(
    head: Callable[[Tensor], Tensor], features: Tensor, y: Tensor, f_drop: float, b_drop: float
) -> Tensor:
    """Which features (N, F) are not muted; `y` (N,) labels or (N, classes) probabilities."""
    leaf = features.detach().requires_grad_()
    logits = head(leaf)
    (slopes,) = torch.autograd.grad(of_label(logits, y).sum(), leaf)
    calm = slopes < quantile(slopes, 1 - f_drop)
    with torch.no_grad():
        before, after = (of_label(z.softmax(dim=1), y) for z in (logits, head(leaf * calm)))
        drop = before - after
        spared = drop < quantile(drop, 1 - b_drop)
    return calm | spared[:, None]


def of_label(values: Tensor, y: Tensor) -> Tensor:
    """The entry of the label in each row of (N, classes), or their mean under probabilities."""
    if y.is_floating_point():
        return (values * y).sum(dim=1)
    return values.gather(1, y[:, None]).squeeze(1)


def quantile(values: Tensor, share: float) -> Tensor:
    """The quantile along the last axis, between two values linearly, of any number of them.

    Shape (..., 1). `torch.quantile` refuses more than 16 million values.
    """
    ordered = values.sort(dim=-1).values
    last = ordered.shape[-1] - 1
    place = share * last
    if abs(place - round(place)) < 1e-9:  # a value itself, but for rounding
        place = round(place)
    low = int(place)
    lower, upper = ordered[..., low, None], ordered[..., min(low + 1, last), None]
    return torch.lerp(lower, upper, place - low)
