"""Evaluation: many candidate weights in one pass over the data; selection; early stopping."""

from dgavg.evaluation.scoring import Scorer, SplitScore
from dgavg.evaluation.selection import RULES, selected_step
from dgavg.evaluation.split import Split
from dgavg.evaluation.stopping import Stopping

__all__ = ["RULES", "Scorer", "Split", "SplitScore", "Stopping", "selected_step"]
