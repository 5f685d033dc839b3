"""MLDG: a step on some domains shall help on the others."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle

import torch
from torch import Tensor, nn

from dgavg.batch import Batch, Loss
from dgavg.errors import require
from dgavg.run import Run
from dgavg.trainer import Trainer, trainer
from dgavg.trainers.gradient.passes import moved, with_gradient

Sums = dict[nn.Parameter, Tensor]


@trainer("mldg", splits_domains=True, min_domains=2)
class MLDG(Trainer):
    """MLDG: a step on some domains shall help on others (Li et al. 2018, arXiv 1710.03463).

    Each step splits the D domains at random into `n_meta_test` meta-test domains and the meta-train
    domains, and pairs every meta-train domain i with a meta-test domain j in turn. With g_i the
    gradient of i at w and g_j that of j after one first step of Adam with g_i, the optimizer steps
    with Σ over pairs (g_i + beta·g_j)/D. So it is DomainBed's; the paper takes an SGD step on all
    meta-train domains together and differentiates through it. Passes at w give the batch-norm
    statistics and the loss reported (DomainBed runs all on copies, and its statistics never move).

    - `n_meta_test` (2; usual 1 or 2): meta-test domains, fewer than there are domains.
    - `beta` (1; usual 0.1 to 10): weight of the meta-test gradients.

    Cost: two passes over one domain's rows for each meta-train domain, one more copy of the weights
    and two of the gradient. That is less than two passes of `basic`.

    Avoid: two training domains or few rows of each a batch, as every pass, and its batch norm,
    sees one domain's alone.
    """

    n_meta_test: int = 2
    beta: float = 1.0

    def validate(self) -> None:
        """Refuse settings out of range."""
        require(
            self.n_meta_test >= 1, f"trainer.mldg.n_meta_test={self.n_meta_test}: a number from 1"
        )
        require(self.beta >= 0, f"trainer.mldg.beta={self.beta}: a number from 0 on")

    def setup(self, run: Run) -> None:
        """Refuse a split without meta-train domains."""
        self._check(len(run.names))

    def _check(self, domains: int) -> None:
        require(
            self.n_meta_test < domains,
            f"trainer.mldg.n_meta_test={self.n_meta_test} leaves no domain to train on: fewer than "
            f"the {domains} training domains",
        )

    def grad(self, run: Run, batch: Batch) -> Loss:
        """The gradients of all pairs."""
        if batch.domains == 1:
            return self.inner.grad(run, batch)
        self._check(batch.domains)
        parts, rates = batch.split(), learning_rates(run)
        order = run.random("mldg").permutation(batch.domains).tolist()
        train, test = order[: -self.n_meta_test], order[-self.n_meta_test :]
        sums: Sums = {}
        losses = []
        for i, j in zip(train, cycle(test)):
            losses.append(self.inner.grad(run, parts[i]))
            add_gradient(run, sums, 1 / batch.domains)
            weights, slopes = with_gradient(run)
            with moved(run, weights, adam_step(slopes, [rates[w] for w in weights])):
                self.inner.grad(run, parts[j])
            add_gradient(run, sums, self.beta / batch.domains)
        for parameter in run.parameters:
            parameter.grad = sums.get(parameter)
        return mean_loss(losses)


def learning_rates(run: Run) -> dict[nn.Parameter, float]:
    """The learning rate of every parameter at this step."""
    lr, groups = run.lr(), zip(run.optimizer.param_groups, run.lr_scales, strict=True)
    return {p: lr * scale for group, scale in groups for p in group["params"]}


def adam_step(gradients: list[Tensor], rates: list[float]) -> list[Tensor]:
    """The first step of a new Adam, without weight decay: −lr·g/(|g| + 1e-8)."""
    lengths = torch._foreach_abs(gradients)
    torch._foreach_add_(lengths, 1e-8)
    steps = torch._foreach_div(gradients, lengths)
    return list(torch._foreach_mul(steps, [-rate for rate in rates]))


def add_gradient(run: Run, sums: Sums, factor: float) -> None:
    """Add `factor` times the gradients to `sums`."""
    weights, slopes = with_gradient(run)
    for weight, part in zip(weights, torch._foreach_mul(slopes, factor), strict=True):
        sums[weight] = sums[weight] + part if weight in sums else part


def mean_loss(losses: list[Loss]) -> Loss:
    """One risk, the mean of all, and the mean of each term; the rest of the first."""
    risk = torch.stack([torch.dot(one.weights, one.risks).detach() for one in losses]).mean()
    terms = {
        name: torch.stack([one.terms[name].detach() for one in losses]).mean()
        for name in losses[0].terms
    }
    weights = torch.ones(1, device=risk.device)
    return replace(losses[0], risks=risk.reshape(1), weights=weights, terms=terms)
