"""`+zoo=pacs/swad`: Hydra composes the recipes of `zoo/`, less what they say of themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from omegaconf import OmegaConf

import dgavg

PACKAGE = Path(dgavg.__file__).parent
INSIDE = PACKAGE / "zoo"  # in an installed wheel
ZOO = INSIDE if INSIDE.is_dir() else PACKAGE.parent / "zoo"
ABOUT = "zoo"  # the key of a recipe that is for readers: paper, published and measured numbers


class ZooSource(ConfigSource):
    """A source of configs `zoo/<benchmark>/<recipe>` from the YAML files of `zoo/`."""

    @staticmethod
    def scheme() -> str:
        """The scheme of its search path, `zoo://`."""
        return "zoo"

    def available(self) -> bool:
        """Whether the recipes are there."""
        return ZOO.is_dir()

    def is_group(self, config_path: str) -> bool:
        """Whether this is the group `zoo` or a benchmark in it."""
        return config_path == "" or (_inside(config_path) and _place(config_path).is_dir())

    def is_config(self, config_path: str) -> bool:
        """Whether there is such a recipe."""
        return _inside(config_path) and _file(config_path).is_file()

    def load_config(self, config_path: str) -> ConfigResult:
        """The settings of a recipe, to be merged over all others."""
        if not self.is_config(config_path):
            raise ConfigLoadError(f"no recipe {config_path}")
        text = _file(config_path).read_text(encoding="utf-8")
        config: Any = OmegaConf.create(text)
        config.pop(ABOUT, None)
        return ConfigResult(
            config=config,
            path=f"{self.scheme()}://{self.path}",
            provider=self.provider,
            header={"package": "_global_"},
        )

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """The benchmarks, or the recipes of one of them."""
        if config_path == "":
            return ["zoo"]
        place = _place(config_path)
        groups = [p.name for p in place.iterdir() if p.is_dir()]
        configs = [p.stem for p in place.glob("*.yaml")]
        if results_filter is ObjectType.GROUP:
            return sorted(groups)
        return sorted(configs if results_filter is ObjectType.CONFIG else [*groups, *configs])


def recipe_names(benchmark: str = "*") -> list[str]:
    """The recipes of a benchmark, or of all: `pacs/swad` and so on."""
    found = ZOO.glob(f"{benchmark}/*.yaml")
    return sorted(str(path.relative_to(ZOO).with_suffix("")) for path in found)


def _inside(config_path: str) -> bool:
    return config_path == "zoo" or config_path.startswith("zoo/")


def _place(config_path: str) -> Path:
    return ZOO / config_path.removeprefix("zoo").lstrip("/")


def _file(config_path: str) -> Path:
    return _place(config_path.removesuffix(".yaml") + ".yaml")
