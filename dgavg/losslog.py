"""The losses of the last steps: kept on the device, fetched together, checked for being finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dgavg.batch import Loss
from dgavg.errors import UserError


class NonFiniteLossError(UserError):
    """A loss became NaN or infinite: names the step and the domain or term it happened in."""


class LossLog:
    """Mean losses since the last reading, without a host sync a step.

    `domains` are the names of the training domains. `write` costs one small kernel; `flush` fetches
    what was written since.
    """

    def __init__(self, domains: Sequence[str]) -> None:
        self.domains = list(domains)
        self.last = math.nan
        self._rows: list[tuple[tuple[str, ...], Tensor]] = []
        self._sums: dict[str, float] = {}
        self._count = 0

    @torch.no_grad()
    def write(self, loss: Loss) -> None:
        """Note one step's total, domain risks and terms."""
        terms = [torch.as_tensor(t).to(loss.risks).reshape(1) for t in loss.terms.values()]
        values = [loss.total.reshape(1), loss.risks, *terms]
        self._rows.append((tuple(loss.terms), torch.cat(values)))

    def flush(self, t: int) -> None:
        """Fetch the rows written since the last flush; the newest one is that of step `t - 1`.

        Raises `NonFiniteLossError`.
        """
        if not self._rows:
            return
        rows, self._rows = self._rows, []
        values = torch.cat([row for _, row in rows]).tolist()
        for i, (terms, row) in enumerate(rows):
            risks = self.domains if len(row) == 1 + len(self.domains) + len(terms) else ["all"]
            names = ["total", *(f"risk/{d}" for d in risks), *(f"term/{k}" for k in terms)]
            here, values = values[: len(row)], values[len(row) :]
            found = dict(zip(names, here, strict=True))
            self._check(found, step=t - len(rows) + i)
            for name, value in found.items():
                self._sums[name] = self._sums.get(name, 0.0) + value
            self._count += 1
            self.last = found["total"]

    def _check(self, found: dict[str, float], step: int) -> None:
        if math.isfinite(found["total"]) and all(map(math.isfinite, found.values())):
            return
        bad = [k for k, v in found.items() if k != "total" and not math.isfinite(v)] or ["total"]
        kind, _, name = bad[0].partition("/")
        what = {"risk": f"the loss of domain {name!r}", "term": f"the term {name!r}"}
        raise NonFiniteLossError(
            f"step {step}: {what.get(kind, 'the total loss')} is {found[bad[0]]}; "
            "try a lower optimizer.lr or a smaller weight"
        )

    def read(self) -> dict[str, float]:
        """Means since the last reading, by name; starts anew."""
        means = {k: v / self._count for k, v in self._sums.items()}
        self._sums, self._count = {}, 0
        return means

    def state_dict(self) -> dict[str, Any]:
        """The sums since the last reading; flush first."""
        return {"sums": dict(self._sums), "count": self._count}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._sums, self._count, self._rows = dict(saved["sums"]), saved["count"], []
