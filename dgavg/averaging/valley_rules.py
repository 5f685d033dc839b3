"""When SWAD's valley begins and ends, and which means of weights are kept until that is known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from dgavg.averaging.pairs import Pairs, room

OPEN = ("segment", "pending")  # weights that no evaluation has let into the valley yet


class Sums:
    """Means of weights by name, and how many weights or segments each of them counts for.

    `segment` is the mean since the last evaluation, `valley` what stays in the average, `pending`
    what stays or joins it only if the loss falls back.
    """

    def __init__(self) -> None:
        self.means: dict[str, list[Tensor]] = {}
        self.counts: dict[str, int] = {}

    def put(self, name: str, mean: list[Tensor], count: int) -> None:
        """Keep `mean` itself, not a copy of it."""
        self.means[name], self.counts[name] = mean, count

    def copy(self, name: str, tensors: list[Tensor], count: int, like: str = "segment") -> None:
        """Overwrite `name` with a copy of `tensors`."""
        if name not in self.means:
            self.means[name] = empty_like(self.means[like])
        Pairs(self.means[name], tensors).copy()
        self.counts[name] = count

    def add(self, source: str, into: str) -> None:
        """Take `source` into the mean `into` by what both count for; one of count 0 is lost."""
        n, m = self.counts.get(into, 0), self.counts[source]
        if n == 0:
            self.copy(into, self.means[source], m, like=source)
        else:
            Pairs(self.means[into], self.means[source]).lerp(m / (n + m))
        self.counts[into] = n + m

    def move(self, source: str, into: str) -> None:
        """As `add`, and `source` is gone."""
        if into in self.means:
            self.add(source, into)
        else:
            self.put(into, self.means[source], self.counts[source])
        self.drop(source)

    def drop(self, *names: str) -> None:
        """Forget those of `names` that are there."""
        for name in names:
            self.means.pop(name, None)
            self.counts.pop(name, None)

    def keep(self, *names: str) -> None:
        """Forget all others."""
        self.drop(*(self.means.keys() - set(names)))

    def mean(self, names: list[str]) -> list[Tensor]:
        """The mean over several by what they count for; of one, its own tensors."""
        if len(names) == 1:
            return self.means[names[0]]
        total = Sums()
        for name in names:
            total.put(name, self.means[name], self.counts[name])
            total.add(name, "total")
        return total.means["total"]


def empty_like(tensors: list[Tensor]) -> list[Tensor]:
    """Room for a copy."""
    return room(tensors, [t.dtype for t in tensors], [t.device for t in tensors])


class Rule:
    """Reads a loss an evaluation and sorts the sums; `ended` when the average will not change."""

    fields: ClassVar[tuple[str, ...]]  # what changes, for checkpoints

    def __init__(self, n_converge: int, n_tolerance: int, tolerance_ratio: float) -> None:
        self.n_converge, self.n_tolerance = n_converge, n_tolerance
        self.tolerance_ratio = tolerance_ratio
        self.ended = False

    def judge(self, sums: Sums, loss: float, live: list[Tensor]) -> None:
        """Close the segment with the loss of the weights `live` at its end."""
        raise NotImplementedError

    def answer(self, sums: Sums) -> list[str]:
        """The sums whose mean is the average if training ends here."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Numbers, and lists of them."""
        return {k: list(v) if isinstance(v := getattr(self, k), list) else v for k in self.fields}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises `ValueError` for the state of another rule.
        """
        if set(saved) != set(self.fields):
            raise ValueError(f"the state of another rule: it has {', '.join(map(str, saved))}")
        for key, value in saved.items():
            setattr(self, key, list(value) if isinstance(value, list) else value)


class PaperRule(Rule):
    """From the first evaluation that the next n_converge − 1 don't undercut, weight by weight.

    That is the lowest loss so far once it is n_converge − 1 evaluations old, so nothing before the
    lowest is ever needed again.
    """

    fields = ("lowest", "since", "over", "converged", "ended")

    def __init__(self, n_converge: int, n_tolerance: int, tolerance_ratio: float) -> None:
        super().__init__(n_converge, n_tolerance, tolerance_ratio)
        self.lowest = math.inf  # the loss where the valley begins
        self.since = 0  # evaluations after that one
        self.over = 0  # the latest of them in a row that lie above the tolerance
        self.converged = False

    def judge(self, sums: Sums, loss: float, live: list[Tensor]) -> None:
        """Begin a valley at a new lowest loss, or go on with the one there is."""
        if not self.converged and loss < self.lowest:
            self.lowest, self.since, self.over = loss, 0, 0
            sums.copy("valley", live, 1)
            sums.drop("pending")
        else:
            self.since += 1
            if self.over < self.n_tolerance:
                self._extend(sums, loss)
        sums.counts["segment"] = 0  # its mean stays: the answer before convergence
        self.converged = self.lowest < math.inf and self.since >= self.n_converge - 1
        self.ended = self.converged and self.over >= self.n_tolerance
        if self.ended:
            sums.keep("valley")

    def _extend(self, sums: Sums, loss: float) -> None:
        if loss <= self.lowest * (1.0 + self.tolerance_ratio):
            if self.over:
                sums.move("pending", "valley")
            sums.add("segment", "valley")
            self.over = 0
        else:
            sums.add("segment", "pending")
            self.over = self.over + 1 if loss < math.inf else self.n_tolerance
            if self.over == self.n_tolerance:
                sums.drop("pending")

    def answer(self, sums: Sums) -> list[str]:
        """The valley up to now; before there is one, the newest segment."""
        if not self.converged:
            return ["segment"]
        return [name for name in ("valley", "pending") if name in sums.means]


class CodeRule(Rule):
    """What the authors' class computes, segment by segment and with its double counts.

    It keeps two queues, the last n_converge and the last n_tolerance segments. Convergence: the
    oldest of the first queue has its lowest loss. Then some of what the second queue holds is added
    at once, from each later evaluation on its oldest one, and at the end of training all that it
    still holds down to the last one within the threshold. Here a segment joins the valley as soon
    as that much is sure: up to the last one within the threshold none can be lost, since the queue
    can't be all above it before those have been added.

    Segments are numbered from 0 and are sums of their own by number until then: those of the queue
    before convergence, and after it those from before the valley, which count once more while the
    queue still holds them.
    """

    fields = ("seen", "losses", "first", "threshold", "admitted", "ended")

    def __init__(self, n_converge: int, n_tolerance: int, tolerance_ratio: float) -> None:
        super().__init__(n_converge, n_tolerance, tolerance_ratio)
        self.seen = 0  # segments so far
        self.losses: list[float] = []  # of those that are kept; none after convergence
        self.first: int | None = None  # the segment where it converged
        self.threshold = math.inf
        self.admitted = 0  # the last segment that is in the valley

    def judge(self, sums: Sums, loss: float, live: list[Tensor]) -> None:
        """Put the segment into the queues."""
        newest, self.seen = self.seen, self.seen + 1
        sums.move("segment", str(newest))
        sums.counts[str(newest)] = 1
        if self.first is not None:
            self._go_on(sums, loss, newest)
            return
        self.losses.append(loss)
        window = self.losses[-self.n_converge :]
        if len(window) == self.n_converge and min(window) == window[0] < math.inf:
            self._converge(sums, newest)
        elif len(self.losses) == max(self.n_converge, self.n_tolerance, 2):
            sums.drop(str(self.seen - len(self.losses)))  # the next one would push it out
            del self.losses[0]

    def _oldest(self, newest: int) -> int:
        """The number of the oldest segment in the queue of n_tolerance."""
        return max(0, newest - self.n_tolerance + 1)

    def _converge(self, sums: Sums, newest: int) -> None:
        """The valley begins n_converge − 1 segments before the newest."""
        kept = {self.seen - len(self.losses) + i: loss for i, loss in enumerate(self.losses)}
        first = newest - self.n_converge + 1
        base = sum(self.losses[-self.n_converge :]) / self.n_converge
        self.threshold = max(base * (1.0 + self.tolerance_ratio), kept[first])  # but for rounding
        self.first, self.losses = first, []
        spare = self.n_tolerance - self.n_converge
        self.admitted = max(
            max(j for j in range(first, newest + 1) if kept[j] <= self.threshold),
            first - min(spare, 0),  # the shorter queue has lost these: they are added at once
        )
        again = self._again(kept, newest) if spare > 0 else range(0)
        if spare <= 0 or first > 0:
            # Where the queues are equally long, the next one overwrites it: its count is 0.
            sums.counts[str(first)] = int(spare > 0) + (first in again)
            sums.move(str(first), "valley")
        else:
            sums.counts[str(first)] = 0  # see _go_on
        for j in sorted(kept.keys() - {first}):
            if j > self.admitted:
                sums.move(str(j), "pending")
            elif j > first:
                sums.counts[str(j)] = 1 + (j in again)
                sums.move(str(j), "valley")
            elif j <= self._oldest(newest):
                sums.drop(str(j))
            elif j in again:
                sums.add(str(j), "valley")

    def _again(self, kept: Mapping[int, float], newest: int) -> range:
        """The segments of the long queue that count at once and, if they stay in it, once more.

        From the second after the last one above the threshold on: the code skips one too many.
        """
        oldest = self._oldest(newest)
        stop = min(oldest + self.n_tolerance - self.n_converge, newest) + 1
        above = [j for j in range(oldest, stop) if kept[j] > self.threshold]
        return range(above[-1] + 2 if above else oldest + 1, stop)

    def _go_on(self, sums: Sums, loss: float, newest: int) -> None:
        sums.move(str(newest), "pending")
        if loss <= self.threshold:
            self.admitted = newest
            sums.move("pending", "valley")
        oldest = self._oldest(newest)
        if "0" in sums.means and self.first == 0:
            # Converged on the very first: it is the oldest, and added, until the queue is full.
            sums.counts["0"] += 1
            if newest == self.n_tolerance - 1:
                sums.move("0", "valley")
        else:
            sums.drop(str(oldest))  # one from before the valley, if it is
        if self.admitted < oldest:
            self.ended = True
            sums.keep("valley")

    def answer(self, sums: Sums) -> list[str]:
        """The valley and what counts once more; before there is one, the newest segment."""
        if self.first is None:
            return ["segment"] if sums.counts.get("segment") else [str(self.seen - 1)]
        found = [name for name in sums.means if name not in OPEN]
        return [name for name in found if sums.counts[name]] or found


RULES: dict[str, type[Rule]] = {"paper": PaperRule, "code": CodeRule}
