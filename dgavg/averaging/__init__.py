"""Weight averages on plain tensors: usable in any training loop, importing torch alone."""

from dgavg.averaging.average import WeightAverage
from dgavg.averaging.batchnorm import batchnorm_recalibration, recalibrate_batchnorm
from dgavg.averaging.convex import ConvexMean
from dgavg.averaging.exponential import AnnealedMean, ExponentialMean
from dgavg.averaging.flat import flatten_parameters
from dgavg.averaging.latest import LatestMean
from dgavg.averaging.parameters import named_tensors
from dgavg.averaging.posthoc import PostHocMean, PowerMean
from dgavg.averaging.running import RunningMean
from dgavg.averaging.schedules import swa_lr

__all__ = [
    "AnnealedMean",
    "ConvexMean",
    "ExponentialMean",
    "LatestMean",
    "PostHocMean",
    "PowerMean",
    "RunningMean",
    "WeightAverage",
    "batchnorm_recalibration",
    "flatten_parameters",
    "named_tensors",
    "recalibrate_batchnorm",
    "swa_lr",
]
