"""Multirun: the jobs of one command, made from its overrides and handed to Hydra's launcher."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import hydra.version
from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_automatic_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, open_dict

from dgavg.benchmark.experiment import Fold, build
from dgavg.config import CONF, explained, plain, register, replacing
from dgavg.data import DomainDataset
from dgavg.disk import make_folder
from dgavg.distributed import is_first, ranks
from dgavg.errors import UserError, require
from dgavg.sweep.job import Job, check_scored
from dgavg.sweep.reports import Failed, Report, read_reports
from dgavg.sweep.rounds import rounds
from dgavg.sweep.words import Words, one_run

SWEEPS = ".sweeps"  # the folder beside the runs where jobs report


def multirun(words: Words) -> list[Report]:
    """Run all jobs of a command; returns their reports.

    Raises `UserError` and what Hydra raises for settings that can't be composed.
    """
    try:
        return Multirun(words).run()
    finally:
        GlobalHydra.instance().clear()


class Multirun:
    """The jobs of a command, and Hydra's plugins that run them.

    Under Hydra's own launcher a job is one combination of settings, and they run one after another
    here. Under another one each is split into its folds and seeds, so that a job is one run. A
    sweeper other than Hydra's own makes its jobs itself, and each is told how good it was.
    """

    def __init__(self, words: Words) -> None:
        self.words = words
        self.hydra = _hydra(words)
        self.config = self.hydra.compose_config(
            words.options.config_name or "train",
            replacing(words.overrides),
            run_mode=RunMode.MULTIRUN,
            with_log_configuration=False,
        )
        plugins = self.config.hydra
        self.launcher = str(plugins.runtime.choices["hydra/launcher"])
        self.scored = plugins.sweeper._target_.rpartition(".")[2] != "BasicSweeper"
        self.split = plugins.launcher._target_.rpartition(".")[2] != "BasicLauncher"
        require(
            ranks() == 1 or not (self.split or self.scored),
            f"hydra/launcher={self.launcher} starts processes of its own: start dgavg without "
            "torchrun, or leave it out",
        )
        self.context = HydraContext(self.hydra.config_loader, Callbacks(self.config))

    def run(self) -> list[Report]:
        """Run all jobs; returns their reports, those of failed ones, too."""
        jobs, refused = ([], []) if self.scored else self._jobs()
        with _folder(Path(self.config.runs), alone=not self.split) as folder:
            self.config.hydra.sweep.dir = str(folder.resolve())
            debug = os.environ.get("DGAVG_DEBUG") == "1" and not self.split
            task = Job(folder, self.split and not self.scored, self.scored, debug)
            self.context.callbacks.on_multirun_start(config=self.config, config_name="train")
            if self.scored:
                reports = self._sweep(task)
            elif self.split:
                reports = rounds(self._launcher(task).launch, jobs, folder, self.launcher)
            else:
                self._launcher(task).launch(jobs, initial_job_idx=0)
                reports = read_reports(folder)
            self.context.callbacks.on_multirun_end(config=self.config, config_name="train")
        return refused + reports

    def _launcher(self, task: Job) -> Any:
        return Plugins.instance().instantiate_launcher(
            config=self.config, hydra_context=self.context, task_function=task
        )

    def _sweep(self, task: Job) -> list[Report]:
        """Let another sweeper than Hydra's own make the jobs."""
        check_scored(self.config.protocol.selection)
        if self.config.hydra.sweeper._target_.endswith(".OptunaSweeper"):
            _settle_optuna(self.config.hydra.sweeper, one_by_one=not self.split)
        sweeper = Plugins.instance().instantiate_sweeper(
            config=self.config, hydra_context=self.context, task_function=task
        )
        error = None
        try:
            sweeper.sweep(arguments=list(self.config.hydra.overrides.task))
        except ValueError as found:  # of Optuna, where no trial has a value
            error = found
        reports = read_reports(task.folder)
        if error is not None and not any(report.failed for report in reports):
            raise error
        return reports

    def combinations(self) -> list[list[str]]:
        """The overrides of each combination of settings, as Hydra's own sweeper makes them."""
        parser = OverridesParser.create(self.hydra.config_loader)
        swept = self.config.hydra.sweeper.params or {}
        words = [f"{key}={values}" for key, values in swept.items()]
        parsed = parser.parse_overrides([*words, *self.config.hydra.overrides.task])
        (found,) = BasicSweeper.split_arguments(parsed, None)
        return [replacing(overrides) for overrides in found]

    def _jobs(self) -> tuple[list[list[str]], list[Report]]:
        """The overrides of each job, and reports of those that can't begin anywhere."""
        known: dict[str, DomainDataset] = {}
        jobs: list[list[str]] = []
        refused: list[Report] = []
        for overrides in self.combinations():
            config = self._composed(overrides)
            if not self.split:
                jobs.append(overrides)
                continue
            try:
                with explained():
                    settings = plain(config)
                    require(
                        settings["stack"] == 1,
                        f"hydra/launcher={self.launcher} makes each run a job of its own: write "
                        "stack=1",
                    )
                    jobs += [one_run(overrides, *run) for run in _runs(settings, known)]
            except UserError as error:
                refused.append(Report(overrides, failed=[Failed(overrides, str(error))]))
        return jobs, refused

    def _composed(self, overrides: Sequence[str]) -> DictConfig:
        config = self.hydra.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            del config["hydra"]
        return config


def best(reports: Sequence[Report]) -> Report | None:
    """The report with the highest value; of equal ones the first."""
    scored = [report for report in reports if report.value is not None]
    return max(scored, key=lambda report: report.value or 0.0) if scored else None


def _runs(settings: dict[str, Any], known: dict[str, DomainDataset]) -> list[tuple[Fold, int]]:
    """The folds and seeds of a job. Data are loaded here, once: so their caches are made once.

    Raises `UserError` for settings that no job could run with. The device is of where jobs run.
    """
    key = json.dumps(settings["data"], sort_keys=True, default=str)
    experiment = build({**settings, "device": "cpu"}, dataset=known.get(key))
    known[key] = experiment.dataset
    return [(fold, seed) for seed in experiment.seeds for fold in experiment.folds]


def _hydra(words: Words) -> Hydra:
    """Hydra with our configuration, and the folder of `--config-dir`."""
    options = words.options
    register()
    hydra.version.setbase("1.3")
    GlobalHydra.instance().clear()
    path = create_automatic_config_search_path(None, None, options.config_path or str(CONF))
    if options.config_dir is not None:
        folder = Path(options.config_dir).absolute()
        require(folder.is_dir(), f"no folder {options.config_dir}: write --config-dir FOLDER")
        path.prepend("command-line", f"file://{folder}", SearchPathQuery(provider="schema"))
    return Hydra.create_main_hydra2("dgavg", path)


@contextmanager
def _folder(runs: Path, *, alone: bool) -> Iterator[Path]:
    """A new folder of reports beside the runs; it stays where it holds what somebody needs.

    That is a traceback and, where this process isn't `alone`, what its jobs still read and write.
    """
    above = runs / SWEEPS if is_first() else Path(tempfile.mkdtemp())
    make_folder(above)
    folder = Path(tempfile.mkdtemp(prefix=time.strftime("%Y%m%d-%H%M%S-"), dir=above))
    interrupted = False
    try:
        yield folder
    except KeyboardInterrupt:
        interrupted = True
        raise
    finally:
        at_work = interrupted or not all(report.ended for report in read_reports(folder))
        if not list(folder.glob("*.txt")) and (alone or not at_work):
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # others are at work there
                above.rmdir()


def _settle_optuna(sweeper: DictConfig, *, one_by_one: bool) -> None:
    """Optuna as a job's value wants it. A trial that fails is listed by us, and stops no other."""
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        import optuna  # its database layer, which it imports anyway, is of an older style

    sweeper.direction, sweeper.max_failure_rate = "maximize", 1.0
    if one_by_one:
        sweeper.n_jobs = 1
    optuna.logging.set_verbosity(logging.ERROR)
    logging.getLogger("hydra_plugins.hydra_optuna_sweeper").setLevel(logging.CRITICAL)
