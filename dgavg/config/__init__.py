"""Configuration: Hydra composes it from `conf/` and, for trainers, from the registry of links."""

from dgavg.config.compose import CONF, compose, plain, register, replacing
from dgavg.config.errors import explained

__all__ = ["CONF", "compose", "explained", "plain", "register", "replacing"]
