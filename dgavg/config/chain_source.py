"""`trainer=ma_swa_irm_basic`: Hydra composes any chain from the registry, without a YAML file."""

from __future__ import annotations

from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from dgavg.chain import chain, find_trainer, known_trainers
from dgavg.config.schema import link_schema
from dgavg.config.zoo_source import ZooSource
from dgavg.errors import UserError, require


class ChainSource(ConfigSource):
    """A source of configs `trainer/<chain>`: a node a link, in the chain's order.

    It stands last in the search path, so files in `conf/trainer/` come first.
    """

    @staticmethod
    def scheme() -> str:
        """The scheme of its search path, `chain://`."""
        return "chain"

    def available(self) -> bool:
        """Always: the registry is in memory."""
        return True

    def is_group(self, config_path: str) -> bool:
        """Whether this is the group `trainer`."""
        return config_path in ("", "trainer")

    def is_config(self, config_path: str) -> bool:
        """Any name in the group `trainer` is a chain, if perhaps a misspelt one."""
        group, _, spec = config_path.removesuffix(".yaml").rpartition("/")
        return group == "trainer" and spec != ""

    def load_config(self, config_path: str) -> ConfigResult:
        """The typed settings of every link of the chain.

        A chain that `check` refuses is refused here, before any job of a multirun starts.
        """
        spec = config_path.removesuffix(".yaml").rpartition("/")[2]
        names = spec.split("_")
        try:
            links = {name: find_trainer(name, spec) for name in names}
            for name in names:
                require(names.count(name) == 1, f"{spec}: {name!r} stands in the chain twice")
            config = OmegaConf.create(
                {name: OmegaConf.structured(link_schema(cls)) for name, cls in links.items()}
            )
            if not OmegaConf.missing_keys(config):
                # settings come later: where one could make the chain legal, it may
                mildest = {
                    k: OmegaConf.from_dotlist([cls.one_domain])
                    for k, cls in links.items()
                    if cls.one_domain
                }
                chain(spec, **mildest)
        except UserError as error:
            raise ConfigLoadError(str(error)) from error
        return ConfigResult(
            config=config,
            path=f"{self.scheme()}://{self.path}",
            provider=self.provider,
            header={"package": None},
        )

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """The group, or the names that chains are made of."""
        return known_trainers() if config_path == "trainer" else ["trainer"]


class SearchPaths(SearchPathPlugin):
    """Appends `chain://` and `zoo://` to every search path."""

    def manipulate_search_path(self, search_path: object) -> None:
        """Append the sources."""
        for scheme in (ChainSource.scheme(), ZooSource.scheme()):
            search_path.append("dgavg", f"{scheme}://")  # type: ignore[attr-defined]


def register() -> None:
    """Make Hydra know both sources; harmless when done twice."""
    for plugin in (ChainSource, ZooSource, SearchPaths):
        Plugins.instance().register(plugin)
