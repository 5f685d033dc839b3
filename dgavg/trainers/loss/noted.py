"""What a loss saw in a step, kept for the tap that ends the step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dgavg.run import Run


class Noted:
    """One tensor a step: what the first of the step's losses noted, however many there are.

    A wrap may note as often as it runs, a tap takes; between steps there is nothing here, so
    nothing of it is saved. The first loss is the one at the weights that the step starts from.
    """

    def __init__(self) -> None:
        self.t = -1
        self.value: Tensor | None = None

    def note(self, run: Run, value: Tensor) -> None:
        """Keep `value`, unless something was noted in this step already."""
        if self.t != run.t:
            self.t, self.value = run.t, value.detach()

    def take(self) -> Tensor | None:
        """What was noted; None where nothing was."""
        value, self.value = self.value, None
        return value

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a checkpoint stands between two steps."""
        return {}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Forget what was noted before."""
        self.t, self.value = -1, None
