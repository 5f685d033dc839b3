"""Weight averages on plain tensors: usable in any training loop, importing torch alone."""

from dgavg.averaging.average import WeightAverage
from dgavg.averaging.batchnorm import batchnorm_recalibration, recalibrate_batchnorm
from dgavg.averaging.convex import ConvexMean
from dgavg.averaging.ensemble import ensemble
from dgavg.averaging.exponential import AnnealedMean, ExponentialMean
from dgavg.averaging.flat import flatten_parameters
from dgavg.averaging.gaussian import GaussianPosterior
from dgavg.averaging.interpolation import LossBarrier, interpolate, loss_barrier
from dgavg.averaging.latest import LatestMean
from dgavg.averaging.learned_soup import LearnedSoup, learned_soup
from dgavg.averaging.parameters import named_tensors
from dgavg.averaging.posthoc import PostHocMean, PowerMean
from dgavg.averaging.running import RunningMean
from dgavg.averaging.schedules import annealed_lr, cyclic_lr, fge_lr, swa_lr
from dgavg.averaging.snapshots import average_parameters, copy_parameters
from dgavg.averaging.soup import GreedySoup, greedy_soup, uniform_soup
from dgavg.averaging.subspace import WeightSubspace
from dgavg.averaging.subspace_sgd import SubspaceSGD
from dgavg.averaging.validated import ValidatedMean
from dgavg.averaging.valley import LossValley

__all__ = [
    "AnnealedMean",
    "ConvexMean",
    "ExponentialMean",
    "GaussianPosterior",
    "GreedySoup",
    "LatestMean",
    "LearnedSoup",
    "LossBarrier",
    "LossValley",
    "PostHocMean",
    "PowerMean",
    "RunningMean",
    "SubspaceSGD",
    "ValidatedMean",
    "WeightAverage",
    "WeightSubspace",
    "annealed_lr",
    "average_parameters",
    "batchnorm_recalibration",
    "copy_parameters",
    "cyclic_lr",
    "ensemble",
    "fge_lr",
    "flatten_parameters",
    "greedy_soup",
    "interpolate",
    "learned_soup",
    "loss_barrier",
    "named_tensors",
    "recalibrate_batchnorm",
    "swa_lr",
    "uniform_soup",
]
