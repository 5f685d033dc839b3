"""Fishr: the gradients of the classifier shall vary alike in all domains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgavg.batch import Batch, Loss
from dgavg.errors import UserError, require
from dgavg.gather import gather, made_by
from dgavg.run import Run
from dgavg.trainer import Trainer, fixed, state, trainer
from dgavg.trainers.loss.anneal import annealed, jump_of, reset_at
from dgavg.trainers.loss.checks import check_rows, check_weight
from dgavg.trainers.loss.noted import Noted


@trainer("fishr", min_domains=2)
class Fishr(Trainer):
    """Fishr: equal variances of the classifier's gradients (Rame et al. 2022, arXiv 2109.02934).

    A row's gradient in the classifier's weights is (softmax(z) − y) ⊗ [φ, 1], with features φ and
    logits z. v_d is its variance over the rows of domain d, one number a weight, divided by the
    number of rows; it is added up over the steps, s_d = v_d + ema · (s_d of the step before, as a
    constant). Adds weight · mean over domains of mean (s_d − s̄)², where s̄ is the mean over domains.

    As in DomainBed: the paper's squared distance is a sum over the weights, the code's a mean; and
    s_d is the moving average divided by 1 − ema, so that its gradient is that of v_d. The sums
    grow from the first step on, also where the weight is still 0. A step with several passes (SAM)
    adds the variances of the first.

    - `weight` (1000; usual 10 to 1e4).
    - `anneal` (1500): a step, or below 1 a share of the run, up to which there is no penalty; then
      the optimizer's moments are reset. 0 for a penalty from the first step.
    - `ema` (0.95; usual 0.9 to 0.99): how much of the sums is kept a step; 0 for this step alone.

    Cost: no pass; a domain, seven copies of the classifier at the peak and one kept. No gradient of
    a single row is ever formed. The classifier must be linear, or end in a linear layer, whose
    gradients then count alone.

    Avoid: few images a domain and step, whose variances are noise, or thousands of classes, where
    the matrices grow large. The penalty is of fourth order in the features: where they grow, lower
    the weight.
    """

    weight: float = 1000.0
    anneal: float = fixed(1500)
    ema: float = 0.95
    jump: int = state(int)
    sums: Tensor = state()
    noted: Noted = state()

    def validate(self) -> None:
        """Refuse settings out of range."""
        check_weight("fishr", self.weight)
        require(self.anneal >= 0, f"trainer.fishr.anneal={self.anneal}: a number from 0 on")
        require(0 <= self.ema < 1, f"trainer.fishr.ema={self.ema}: from 0 up to below 1")

    def setup(self, run: Run) -> None:
        """Make room for the sums; refuse a classifier without a linear layer at its end."""
        self.jump = jump_of(self, run)
        check_rows("fishr", run)
        last = last_layer(run.model)
        entries = last.in_features + (last.bias is not None)
        self.sums = torch.zeros(len(run.names), last.out_features, entries, device=run.device)
        self.noted = Noted()

    def loss(self, run: Run, batch: Batch) -> Loss:
        """Add the penalty."""
        last = last_layer(run.model)
        with calls_of(last) as calls:
            out = self.inner.loss(run, batch)
        features = input_of(out.logits, calls)
        if len(features) < len(out.logits):  # those of this process alone
            features = gather(features, batch.domains)
        if last.bias is not None:
            features = F.pad(features, (0, 1), value=1.0)
        along = slopes(out.logits, out.batch.y)
        found = variances(batch.by_domain(features), batch.by_domain(along))
        self.noted.note(run, found)
        weight = annealed(run, self.weight, self.jump, before=0.0)
        out.terms["fishr"] = weight * spread(found + self.ema * self.sums)
        return out

    def after_step(self, run: Run) -> None:
        """Add this step's variances; reset the optimizer where the weight jumps."""
        found = self.noted.take()
        if found is not None:
            self.sums.mul_(self.ema).add_(found)
        reset_at(run, self.jump)


def last_layer(model: nn.Module) -> nn.Linear:
    """The linear layer that gives the logits: of a classifier of several parts, the last.

    Raises `UserError` where there is none.
    """
    head = model.classifier
    assert isinstance(head, nn.Module)
    parts = [head[-1]] if isinstance(head, nn.Sequential) and len(head) else list(head.modules())
    layers = [part for part in parts if isinstance(part, nn.Linear)]
    if not layers:
        raise UserError(
            f"fishr needs a linear classifier, here is {type(head).__name__}: make it nn.Linear, "
            "or nn.Sequential with nn.Linear at its end"
        )
    return layers[-1]


@contextmanager
def calls_of(layer: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """What `layer` gets and gives in this block, call by call."""
    calls: list[tuple[Tensor, Tensor]] = []
    hook = layer.register_forward_hook(lambda _, given, out: calls.append((given[0], out)))
    try:
        yield calls
    finally:
        hook.remove()


def input_of(logits: Tensor, calls: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The input, in float32, of the call that gave `logits`: other links may have made more calls.

    Raises `UserError` where none gave them.
    """
    made = made_by(logits)
    nodes = [] if made is None else [node for node, _ in made.next_functions if node is not None]
    found = [
        given
        for given, out in calls
        if (out.grad_fn is made and made is not None)
        or (out.dtype != logits.dtype and out.grad_fn in nodes)  # made float32
    ]
    require(
        bool(found) or not logits.requires_grad,
        "fishr: the logits are not what the classifier's last linear layer gives; make that layer "
        "the end of the classifier",
    )
    return (found or [given for given, _ in calls])[-1].float()


def slopes(logits: Tensor, y: Tensor) -> Tensor:
    """The gradient of each row's cross-entropy in its logits: (N, classes).

    `y` is (N,) labels or (N, classes) probabilities.
    """
    labels = y if y.is_floating_point() else F.one_hot(y, logits.shape[1])
    return logits.softmax(dim=1) - labels


def variances(features: Tensor, slopes: Tensor) -> Tensor:
    """The variance over rows of slope ⊗ feature: (domains, classes, F).

    Of features (domains, rows, F) and slopes (domains, rows, classes). The square of a product is
    the product of squares, so both moments are one matrix product a domain.
    """
    rows = features.shape[1]
    first = slopes.transpose(1, 2) @ features / rows
    second = slopes.square().transpose(1, 2) @ features.square() / rows
    return second - first.square()


def spread(values: Tensor) -> Tensor:
    """The mean squared distance of (domains, ...) from their mean over domains; a scalar."""
    return (values - values.mean(dim=0)).square().mean()
