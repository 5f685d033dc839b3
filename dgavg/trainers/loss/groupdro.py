"""GroupDRO: domains with a large risk count more."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dgavg.batch import Batch, Loss
from dgavg.errors import require
from dgavg.run import Run
from dgavg.trainer import Trainer, state, trainer
from dgavg.trainers.loss.noted import Noted


@trainer("groupdro", min_domains=2)
class GroupDRO(Trainer):
    """GroupDRO: domains with a large risk count more (Sagawa et al. 2020, arXiv 1911.08731).

    The risks are weighted by q: q_d ← q_d · exp(eta · risk_d), divided by the sum, and the loss is
    Σ q_d · risk_d with the q of this step. q is even at the start and kept from step to step; a
    step with several passes (SAM) moves it once, by the risks of the first. The paper also adds a
    term that grows as groups get smaller; as in DomainBed, ours does not.

    - `eta` (0.01; usual 1e-3 to 0.1): how fast q moves; 0 leaves it even.

    Cost: no pass, one number a domain.

    Avoid: domains with noisy labels or too few images, whose risk stays large whatever is learned:
    q ends up there, and the other domains are forgotten.
    """

    eta: float = 0.01
    log_q: Tensor = state()
    noted: Noted = state()

    def validate(self) -> None:
        """Refuse settings out of range."""
        require(
            math.isfinite(self.eta) and self.eta >= 0,
            f"trainer.groupdro.eta={self.eta}: a finite number from 0 on",
        )

    def setup(self, run: Run) -> None:
        """Start with even weights."""
        domains = len(run.names)
        self.log_q = torch.full((domains,), -math.log(domains), device=run.device)
        self.noted = Noted()

    def loss(self, run: Run, batch: Batch) -> Loss:
        """Weigh the risks by this step's q."""
        out = self.inner.loss(run, batch)
        self.noted.note(run, out.risks)
        out.weights = out.weights * self._moved(out.risks.detach()).exp() * batch.domains
        return out

    def after_step(self, run: Run) -> None:
        """Keep this step's q."""
        risks = self.noted.take()
        if risks is not None:
            self.log_q.copy_(self._moved(risks))

    def _moved(self, risks: Tensor) -> Tensor:
        """The logarithm of q after a step with `risks`; as a logarithm, no weight is lost to 0."""
        return torch.log_softmax(self.log_q + self.eta * risks, dim=0)
