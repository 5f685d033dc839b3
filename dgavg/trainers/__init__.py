"""The links that come with dgavg, one a file, in the room of its plane."""

from dgavg.trainers.basic import Basic
from dgavg.trainers.batch.mixup import Mixup
from dgavg.trainers.gradient.sam import SAM
from dgavg.trainers.loss.coral import CORAL
from dgavg.trainers.loss.irm import IRM
from dgavg.trainers.loss.vrex import VREx
from dgavg.trainers.weights.ema import EMA
from dgavg.trainers.weights.ma import MA
from dgavg.trainers.weights.posthocema import PostHocEMA
from dgavg.trainers.weights.sma import SMA
from dgavg.trainers.weights.swa import SWA

__all__ = ["CORAL", "EMA", "IRM", "MA", "SAM", "SMA", "SWA", "Basic", "Mixup", "PostHocEMA", "VREx"]
