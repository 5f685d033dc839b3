"""What a run was made of, made again from its `config.yaml`: settings of data, a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dgavg.chain import adapt, adapting
from dgavg.config import compose
from dgavg.data import DATASETS
from dgavg.models import Model, build_model
from dgavg.settings import keyword_settings


def composed_like(own: Mapping[str, Any], overrides: Sequence[str]) -> DictConfig:
    """The configuration of `overrides` with the data of a run, where they don't say others.

    `own` is what the run's config says of its data: settings of the loader, and hashes of what it
    found. Raises what Hydra raises.
    """
    given = {word.lstrip("+~").partition("=")[0] for word in overrides}
    config = compose([f"data={own['name']}", *overrides])
    for key in keyword_settings(DATASETS[own["name"]]):
        if key in own and f"data.{key}" not in given:
            OmegaConf.update(config, f"data.{key}", own[key], force_add=True)
    return config


def untrained(
    config: Mapping[str, Any], shape: tuple[int, int, int], classes: int, domains: int
) -> Model:
    """The model of a run before training, changed by its links as they change it.

    `shape` is (C, H, W), `domains` how many were trained on. Its weights are random: those of the
    run are loaded over anyway. Raises `UserError` as `build_model` does.
    """
    settings = dict(config["model"])
    if "weights" in settings:
        settings["weights"] = None
    model = build_model(input_shape=shape, classes=classes, **settings)
    adapt(adapting(config["trainer"]), model, domains)
    return model
