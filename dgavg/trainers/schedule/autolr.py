"""AutoLR: the learning rate drops when validation stops getting better, and then training ends."""

from __future__ import annotations

import math

from dgavg.errors import require, unknown
from dgavg.run import Run
from dgavg.trainer import Scores, Trainer, fixed, state, trainer

THRESHOLD = 1e-4  # of the best loss: torch's ReduceLROnPlateau


@trainer("autolr")
class AutoLR(Trainer):
    """Auto-lr of ERM++: drops when validation stalls (Teterwak et al. 2023, arXiv 2304.01973).

    At each evaluation the validation loss of one candidate is better if it is below 0.9999 times
    the best so far. When it was not for more than `patience` evaluations in a row, the learning
    rate is multiplied by `factor`; at drop number `limit` training ends instead. This is ERM++'s
    code (torch's ReduceLROnPlateau), which reads the loss of the running average of the weights.

    The steps at which it dropped are in the reason why the run stopped and, as `found`, in the
    state of the link (`checkpoint.pt`: run, links, autolr); the `lr` of each record shows them too.
    ERM++ then trains anew on all data by them: `drops=[300, 900, 1200]`.

    - `candidate` (`sma`, the running average): whose validation loss is watched; `live` for the
      weights that are trained.
    - `factor` (0.1; usual 0.1 to 0.5).
    - `patience` (1; usual 0 to 5): evaluations without a better loss that pass before a drop.
    - `limit` (3): the drop at which training ends; 0 for never.
    - `start` (0; ERM++ 500, where its classifier no longer trains alone): a step, or below 1 a
      share of the run, up to which evaluations don't count.
    - `drops` (none): steps of another run at which to drop, in place of watching. Where there are
      `limit` of them the run ends at the last, or at the first evaluation from there on.

    Cost: no pass, no memory. Evaluations decide, so they must not be rare.

    Avoid: validation sets so small that their loss is noise; and a learning rate that decays by
    itself beside it, for both act.
    """

    candidate: str = "sma"
    factor: float = 0.1
    patience: int = 1
    limit: int = 3
    start: float = fixed(0)
    drops: list[int] | None = None
    first: int = state(int)
    best: float = state(lambda: math.inf)
    bad: int = state(int)
    found: list[int] = state(list)

    def validate(self) -> None:
        """Refuse settings out of range."""
        where, drops = "trainer.autolr", list(self.drops or [])
        require(0 < self.factor < 1, f"{where}.factor={self.factor}: a number between 0 and 1")
        require(self.patience >= 0, f"{where}.patience={self.patience}: evaluations, 0 or more")
        require(self.limit >= 0, f"{where}.limit={self.limit}: a number of drops, or 0")
        require(self.start >= 0, f"{where}.start={self.start}: a number from 0 on")
        require(
            drops == sorted(set(drops)) and (not drops or drops[0] >= 1),
            f"{where}.drops={drops}: steps from 1 on, in rising order",
        )
        require(
            not self.limit or len(drops) <= self.limit,
            f"{where}.drops={drops}: training ends at drop {self.limit}; raise {where}.limit",
        )

    def setup(self, run: Run) -> None:
        """Find the first step that counts; refuse drops past the end and nothing to watch."""
        self.first = run.step_of(self.start, "trainer.autolr.start")
        if self.drops is not None:
            require(
                max(self.drops, default=0) <= run.steps,
                f"trainer.autolr.drops={list(self.drops)}: past the end of a run of {run.steps}",
            )
            return
        names = ["live", *(name for link in run.trainer for name in link.candidate_names())]
        if self.candidate not in names:
            raise unknown("candidate", self.candidate, names, "trainer.autolr.candidate")
        require(
            run.evaluate is not None,
            "autolr watches the validation loss, but the run has no evaluation: give "
            "trainer.autolr.drops",
        )

    def decides_by(self) -> list[str]:
        """What it watches, if it does."""
        return [self.candidate] if self.drops is None else []

    def may_end(self) -> bool:
        """Where there may be as many drops as `limit`."""
        return self.limit > 0 and (self.drops is None or len(self.drops) >= self.limit)

    def lr(self, run: Run) -> float:
        """The inner learning rate, dropped as often as was decided."""
        return float(self.inner.lr(run) * self.factor ** self._count(run.t))

    def after_eval(self, run: Run, scores: Scores) -> None:
        """Look at the loss; drop, or end training."""
        if run.closed:
            return
        if self.drops is None and run.t >= self.first and self.candidate in scores:
            self._watch(run.t, scores[self.candidate]["loss"])
        self._end(run)

    def after_step(self, run: Run) -> None:
        """Without evaluations, end at the last of the given drops."""
        if run.evaluate is None:
            self._end(run)

    def _end(self, run: Run) -> None:
        steps = self.found if self.drops is None else list(self.drops)
        if self.limit and self._count(run.t) >= self.limit and not run.stop:
            run.stop = f"'autolr' dropped the learning rate at steps {', '.join(map(str, steps))}"

    def _count(self, t: int) -> int:
        """Drops up to step `t`."""
        steps = self.found if self.drops is None else self.drops
        return sum(t >= step for step in steps)

    def _watch(self, t: int, loss: float) -> None:
        if loss < self.best * (1 - THRESHOLD):
            self.best, self.bad = loss, 0
        else:
            self.bad += 1
        if self.bad > self.patience:
            self.found, self.bad = [*self.found, t], 0
