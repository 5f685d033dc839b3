"""Weight averages on plain tensors: usable in any training loop, importing torch alone."""

from dgavg.averaging.average import WeightAverage
from dgavg.averaging.batchnorm import batchnorm_recalibration, recalibrate_batchnorm
from dgavg.averaging.exponential import ExponentialMean
from dgavg.averaging.parameters import named_tensors
from dgavg.averaging.running import RunningMean
from dgavg.averaging.schedules import swa_lr

__all__ = [
    "ExponentialMean",
    "RunningMean",
    "WeightAverage",
    "batchnorm_recalibration",
    "named_tensors",
    "recalibrate_batchnorm",
    "swa_lr",
]
