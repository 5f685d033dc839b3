"""ANDMask: only what all domains agree on is learned."""

from __future__ import annotations

from dgavg.batch import Batch, Loss
from dgavg.errors import require
from dgavg.run import Run
from dgavg.trainer import Trainer, trainer
from dgavg.trainers.gradient.masks import agreement, write_masked
from dgavg.trainers.gradient.passes import domain_gradients


@trainer("andmask", min_domains=2, compares_gradients=True)
class ANDMask(Trainer):
    """AND-mask: learns where all domains' signs agree (Parascandolo et al. 2021, arXiv 2009.00329).

    With g_d the gradient of domain d, an entry is kept where |mean_d sign g_d| ≥ tau, else 0: the
    gradient is mask·mean_d g_d / mean(mask), the last mean over each tensor, as in the authors'
    code and DomainBed. Terms of penalties are part of every g_d.

    - `tau` (1; usual 0.5 to 1): the agreement asked for; 1 is that of all, 0 no mask.

    Cost: one forward pass and a backward pass a domain; all domains' gradients in memory at once.
    Where `sam` or the like stands further in, its passes once a domain.

    Avoid: many domains with a `tau` of 1, where hardly an entry is left, and Adam with a high
    learning rate: it steps as far for a masked entry's rare gradient as for a common one.
    """

    tau: float = 1.0

    def validate(self) -> None:
        """Refuse settings out of range."""
        require(0 <= self.tau <= 1, f"trainer.andmask.tau={self.tau}: a number in [0, 1]")

    def grad(self, run: Run, batch: Batch) -> Loss:
        """The masked gradient."""
        found = domain_gradients(self, run, batch)
        return write_masked(found, (agreement(found.rows) >= self.tau).to(found.rows.dtype))
