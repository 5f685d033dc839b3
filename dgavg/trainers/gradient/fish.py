"""Fish: walk through the domains one by one, then go part of the way."""

from __future__ import annotations

from dataclasses import replace

import torch

from dgavg.batch import Batch, Loss
from dgavg.errors import require
from dgavg.run import Run
from dgavg.trainer import Trainer, trainer


@trainer("fish", splits_domains=True, owns_step=True, min_domains=2)
class Fish(Trainer):
    """Fish: gradient matching by a walk through the domains (Shi et al. 2022, arXiv 2104.09937).

    From the weights w, one step of the optimizer on each domain's rows alone, one after the other,
    leads to w~; the update is w + meta_lr·(w~ − w), which to first order maximises the gradients'
    inner products. Running statistics of batch norm and modules beside the model go the same part
    of the way; whole numbers are those at w~. The optimizer is the inner one, and its moments carry
    on, as in DomainBed. The order of domains is drawn anew each step, as in the paper (DomainBed's
    is always the same, so one domain is always last). Loss scaling and clipping act on every inner
    step.

    - `meta_lr` (0.5; usual 0.05 to 1): how much of the way; 1 is plain training on one domain at a
      time.

    Cost: one forward and one backward pass over each domain's rows, as much as `basic`, but D
    steps of the optimizer; one more copy of the weights.

    Avoid: few rows of each domain a batch, as every pass, and its batch norm, sees one domain's
    alone; and a learning rate tuned for `basic`, of which it takes D steps an update.
    """

    meta_lr: float = 0.5

    def validate(self) -> None:
        """Refuse settings out of range."""
        require(0 < self.meta_lr <= 1, f"trainer.fish.meta_lr={self.meta_lr}: a number in (0, 1]")

    def step(self, run: Run, batch: Batch) -> Loss:
        """One inner step a domain, then `meta_lr` of the way from where they began."""
        tensors = [*run.live.values(), *run.extras.state_dict().values()]
        moving = [t for t in tensors if t.is_floating_point()]
        before = [t.detach().clone() for t in moving]
        parts, losses = batch.split(), {}
        for i in run.random("fish").permutation(batch.domains).tolist():
            losses[i] = self.inner.step(run, parts[i])
        with torch.no_grad():
            torch._foreach_copy_(moving, torch._foreach_lerp(before, moving, self.meta_lr))
        return joined([losses[i] for i in sorted(losses)], batch)


def joined(losses: list[Loss], batch: Batch) -> Loss:
    """The losses of one domain each, in order, as that of all."""
    terms = {
        name: torch.stack([one.terms[name].detach() for one in losses]).mean()
        for name in losses[0].terms
    }
    risks, logits, features = (
        torch.cat([getattr(one, part).detach() for one in losses])
        for part in ("risks", "logits", "features")
    )
    weights = torch.cat([one.weights for one in losses]) / len(losses)
    y, d = (torch.cat([getattr(one.batch, part) for one in losses]) for part in ("y", "d"))
    return Loss(risks, weights, logits, features, replace(batch, y=y, d=d), terms)
