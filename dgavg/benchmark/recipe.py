"""Recipe: what a soup or an ensemble is made of, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dgavg.errors import require, unknown

RULES = {
    "uniform": "the mean of all runs",
    "greedy": "the best run on validation data, and each other that makes it better",
    "restricted": "as greedy, and each that makes it no worse",
    "learned": "a combination fitted to validation data",
}
LEARNED = {"lr": 0.05, "steps": 100}
POLICIES = ("recalibrate", "average")


@dataclass(frozen=True)
class Recipe:
    """What is made of which weights: a soup by a rule, or an ensemble.

    Raises `UserError` for an unknown rule or policy, and for a rule that reads validation scores
    across seeds, whose runs have no validation data in common.
    """

    kind: str  # soup or ensemble
    candidate: str
    rule: str = "uniform"
    batchnorm: str = "recalibrate"
    across_seeds: bool = False

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise unknown("rule", self.rule, RULES)
        if self.batchnorm not in POLICIES:
            raise unknown("batch-norm policy", self.batchnorm, POLICIES)
        require(
            not self.across_seeds or self.rule == "uniform",
            f"--rule {self.rule} --across-seeds: runs of different seeds have no validation data "
            "in common; write --rule uniform",
        )

    @property
    def chain(self) -> str:
        """What tables call it."""
        rule = f"{self.rule} " if self.kind == "soup" else ""
        return f"{rule}{self.kind} of {self.candidate}" + ", all seeds" * self.across_seeds

    def settings(self) -> dict[str, Any]:
        """What its numbers come from, beside the runs."""
        found: dict[str, Any] = {"candidate": self.candidate, "across_seeds": self.across_seeds}
        if self.kind == "soup":
            found |= {"rule": self.rule, "batchnorm": self.batchnorm}
            found |= LEARNED if self.rule == "learned" else {}
        return found
