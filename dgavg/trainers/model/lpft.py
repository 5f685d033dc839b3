"""LPFT: first the classifier alone, then everything."""

from __future__ import annotations

from torch import nn

from dgavg.averaging.batchnorm import batchnorm_layers
from dgavg.batch import Batch, Loss
from dgavg.errors import require
from dgavg.run import Run
from dgavg.trainer import Trainer, fixed, state, trainer
from dgavg.trainers.loss.anneal import reset_at
from dgavg.trainers.model.inside import evaluating, featurizer_of


@trainer("lpft")
class LPFT(Trainer):
    """Linear probing, then fine-tuning (Kumar et al. 2022, arXiv 2202.10054).

    For the first `probe` steps the classifier trains alone: no other parameter of the model has a
    gradient, so none moves, by weight decay or momentum neither. Modules that links train beside
    the model go on. The paper probes until the classifier has converged, on features computed
    once; ERM++ (Teterwak et al. 2023, arXiv 2304.01973) for 500 steps on augmented batches, which
    is what this does.

    - `probe` (500; ERM++ 500): a step, or below 1 a share of the run, up to which the classifier
      trains alone. 0 for never.
    - `freeze_bn` (true, as the paper): while probing, the featurizer's batch norm normalises by its
      running statistics and leaves them alone. ERM++ lets them move: false.
    - `reset` (false): forget the optimizer's moments where probing ends. ERM++ begins the second
      phase with an optimizer that is new to the classifier too.

    Cost: no pass, no memory. A probing step costs as much as any other: the gradients that links
    may ask for are taken, then dropped.

    Avoid: featurizers that start from random weights: there is nothing to probe.
    """

    probe: float = fixed(500)
    freeze_bn: bool = True
    reset: bool = False
    jump: int = state(int)

    def validate(self) -> None:
        """Refuse settings out of range."""
        require(self.probe >= 0, f"trainer.lpft.probe={self.probe}: a number from 0 on")

    def setup(self, run: Run) -> None:
        """Find the step where probing ends."""
        self.jump = run.step_of(self.probe, "trainer.lpft.probe")

    def grad(self, run: Run, batch: Batch) -> Loss:
        """While probing, gradients of the classifier alone."""
        if run.t >= self.jump:
            return self.inner.grad(run, batch)
        featurizer, classifier = featurizer_of(run), run.model.classifier
        assert isinstance(classifier, nn.Module)
        frozen: list[nn.Module] = [*batchnorm_layers(featurizer)] if self.freeze_bn else []
        with evaluating(featurizer, frozen):
            loss = self.inner.grad(run, batch)
        trains = {id(p) for p in classifier.parameters()}
        for parameter in run.model.parameters():
            if id(parameter) not in trains:
                parameter.grad = None
        return loss

    def after_step(self, run: Run) -> None:
        """Reset the optimizer where probing ends, if asked for."""
        if self.reset:
            reset_at(run, self.jump)
