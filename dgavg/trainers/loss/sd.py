"""SD: large logits are penalised, so that no feature starves the others."""

from __future__ import annotations

from dgavg.batch import Batch, Loss
from dgavg.run import Run
from dgavg.trainer import Trainer, trainer
from dgavg.trainers.loss.checks import check_weight


@trainer("sd", stackable=True)
class SD(Trainer):
    """SD: spectral decoupling, a penalty on large logits (Pezeshki et al. 2021, arXiv 2011.09468).

    Adds weight · mean of z² over all logits z of the batch. The paper writes λ/2 · ‖z‖²; the mean
    over rows and classes is DomainBed's, so its λ is twice ours divided by the number of classes.

    - `weight` (0.1; usual 1e-5 to 0.1).

    Cost: no pass, no memory beyond the forward pass.

    Avoid: where probabilities matter beside accuracy, since small logits are unsure predictions. It
    asks nothing of the domains, so a feature that holds in only one of them is as good as another.
    """

    weight: float = 0.1

    def validate(self) -> None:
        """Refuse settings out of range."""
        check_weight("sd", self.weight)

    def loss(self, run: Run, batch: Batch) -> Loss:
        """Add the penalty."""
        out = self.inner.loss(run, batch)
        out.terms["sd"] = self.weight * out.logits.square().mean()
        return out
