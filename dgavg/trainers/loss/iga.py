"""IGA: all domains shall have the same gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dgavg.batch import Batch, Loss
from dgavg.run import Run
from dgavg.trainer import Trainer, trainer
from dgavg.trainers.loss.checks import check_weight


@trainer("iga", min_domains=2)
class IGA(Trainer):
    """IGA: inter-environment gradient alignment (Koyama and Yamaguchi 2020, arXiv 2008.01883).

    Adds weight · Σ_d ‖g_d − ḡ‖², where g_d is the gradient of domain d's risk in all parameters and
    ḡ their mean, differentiated through. The paper takes the mean over domains (the trace of the
    gradients' covariance); the sum is DomainBed's, and so is the default weight. Under several
    processes each takes its own batch's penalty.

    - `weight` (1000; usual 10 to 1e5).

    Cost: a backward pass a domain that keeps its graph, and one through all of them: about D + 2
    passes and several times the memory of `basic`.

    Avoid: layers without a second derivative, such as fused attention and compiled models (PyTorch
    says so in an error), and large models: prefer `fishr` or `andmask`.
    """

    weight: float = 1000.0

    def validate(self) -> None:
        """Refuse settings out of range."""
        check_weight("iga", self.weight)

    def loss(self, run: Run, batch: Batch) -> Loss:
        """Add the penalty."""
        out = self.inner.loss(run, batch)
        found = [run.update.gradients(risk, create_graph=True) for risk in out.risks]
        out.terms["iga"] = self.weight * penalty(found)
        return out


def penalty(gradients: Sequence[Sequence[Tensor | None]]) -> Tensor:
    """Σ_d ‖g_d − ḡ‖² of each domain's list of gradients (None where no risk reaches); a scalar."""
    rows = [torch.cat([g.flatten() for g in own if g is not None]) for own in gradients]
    found = torch.stack(rows)
    return (found - found.mean(dim=0)).square().sum()
