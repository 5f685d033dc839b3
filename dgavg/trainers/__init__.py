"""The links that come with dgavg, one a file, in the room of its plane."""

from dgavg.trainers.basic import Basic
from dgavg.trainers.batch.cutmix import CutMix
from dgavg.trainers.batch.mixstyle import MixStyle
from dgavg.trainers.batch.mixup import Mixup
from dgavg.trainers.gradient.andmask import ANDMask
from dgavg.trainers.gradient.fish import Fish
from dgavg.trainers.gradient.gsam import GSAM
from dgavg.trainers.gradient.mldg import MLDG
from dgavg.trainers.gradient.pcgrad import PCGrad
from dgavg.trainers.gradient.sagm import SAGM
from dgavg.trainers.gradient.sam import SAM
from dgavg.trainers.gradient.sandmask import SANDMask
from dgavg.trainers.loss.causirl import CausIRL
from dgavg.trainers.loss.coral import CORAL
from dgavg.trainers.loss.dial import DIAL
from dgavg.trainers.loss.eqrm import EQRM
from dgavg.trainers.loss.fishr import Fishr
from dgavg.trainers.loss.groupdro import GroupDRO
from dgavg.trainers.loss.iberm import IBERM
from dgavg.trainers.loss.ibirm import IBIRM
from dgavg.trainers.loss.iga import IGA
from dgavg.trainers.loss.irm import IRM
from dgavg.trainers.loss.mmd import MMD
from dgavg.trainers.loss.rsc import RSC
from dgavg.trainers.loss.sd import SD
from dgavg.trainers.loss.vrex import VREx
from dgavg.trainers.model.arm import ARM
from dgavg.trainers.model.cdann import CDANN
from dgavg.trainers.model.dann import DANN
from dgavg.trainers.model.lpft import LPFT
from dgavg.trainers.model.miro import MIRO
from dgavg.trainers.model.mtl import MTL
from dgavg.trainers.schedule.autolr import AutoLR
from dgavg.trainers.weights.aswa import ASWA
from dgavg.trainers.weights.ema import EMA
from dgavg.trainers.weights.lawa import LAWA
from dgavg.trainers.weights.ma import MA
from dgavg.trainers.weights.posthocema import PostHocEMA
from dgavg.trainers.weights.sma import SMA
from dgavg.trainers.weights.swa import SWA
from dgavg.trainers.weights.swad import SWAD
from dgavg.trainers.weights.swag import SWAG
from dgavg.trainers.weights.twa import TWA

__all__ = [
    "ARM",
    "ASWA",
    "CDANN",
    "CORAL",
    "DANN",
    "DIAL",
    "EMA",
    "EQRM",
    "GSAM",
    "IBERM",
    "IBIRM",
    "IGA",
    "IRM",
    "LAWA",
    "LPFT",
    "MA",
    "MIRO",
    "MLDG",
    "MMD",
    "MTL",
    "RSC",
    "SAGM",
    "SAM",
    "SD",
    "SMA",
    "SWA",
    "SWAD",
    "SWAG",
    "TWA",
    "ANDMask",
    "AutoLR",
    "Basic",
    "CausIRL",
    "CutMix",
    "Fish",
    "Fishr",
    "GroupDRO",
    "MixStyle",
    "Mixup",
    "PCGrad",
    "PostHocEMA",
    "SANDMask",
    "VREx",
]
