"""Job: what Hydra runs for each combination of settings, here or in a process of a launcher."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from dgavg.benchmark.campaign import Failure, run_experiments
from dgavg.benchmark.experiment import experiments
from dgavg.benchmark.folder import BusyError
from dgavg.benchmark.table import Table
from dgavg.config import explained, plain, register
from dgavg.distributed import ranks
from dgavg.errors import UserError, require
from dgavg.evaluation.selection import SCORES_HELD_OUT
from dgavg.sweep.reports import Failed, Report, finished
from dgavg.sweep.words import one_run


@dataclass(frozen=True)
class Job:
    """Trains what a configuration says and writes a `Report` of it into `folder`.

    It can be pickled. It raises nothing that a run can do: whoever runs many jobs stops at the
    first exception. `split` says that it is one run of many in processes of their own, so it shows
    nothing itself and leaves a run that another process is training to its parent. `scored` says
    that a sweeper wants to know how good it was. `strict` raises what no user can mend.
    """

    folder: Path
    split: bool = False
    scored: bool = False
    strict: bool = False

    def __call__(self, config: DictConfig) -> float | None:
        """Run the job; returns the value to maximize, if any."""
        register()  # a new process knows nothing of chains yet
        hydra = HydraConfig.get()
        number = 0 if OmegaConf.is_missing(hydra.job, "num") else int(hydra.job.num)
        report = Report(list(hydra.overrides.task))
        report.write(self.folder, number)
        try:
            with explained():
                self._train(config, report, number)
        except UserError as error:
            report.failed.append(Failed(report.overrides, str(error)))
        except Exception as error:
            if self.strict or ranks() > 1:  # the other processes wait for this one
                raise
            text = "".join(traceback.format_exception(error))
            report.failed.append(Failed(report.overrides, self._message(error, text, number)))
        report.ended = True
        report.write(self.folder, number)
        return report.value

    def _train(self, config: DictConfig, report: Report, number: int) -> None:
        settings = plain(config)
        if self.scored:
            check_scored(settings["protocol"]["selection"])
        every = experiments(settings)
        failures: list[Failure] = []
        tell = report.lines.append if self.split else None
        alone = not self.split
        run_experiments(every, tell=tell, failures=failures, patient=alone, strict=self.strict)
        failed = {one.folder for one in failures}
        folders = [e.run_folder(f, s) for e in every for f in e.folds for s in e.seeds]
        report.runs = [str(folder) for folder in folders if folder not in failed]
        for one in failures:
            again = one_run(report.overrides, one.fold, one.seed)
            busy = str(one.folder) if isinstance(one.error, BusyError) else None
            report.failed.append(
                Failed(again, self._message(one.error, one.traceback, number), busy)
            )
        if self.scored and not failures:
            report.value = objective(report)

    def _message(self, error: Exception, text: str, number: int) -> str:
        """The error in one line; the traceback of one that no user can mend stands in a file."""
        if isinstance(error, UserError):
            return str(error)
        path = self.folder / f"{number}.txt"
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        return f"{line} (traceback in {path})"


def check_scored(rule: str) -> None:
    """Raise `UserError` for a rule that would tell a sweeper of the held-out domain."""
    require(
        rule not in SCORES_HELD_OUT,
        f"protocol.selection={rule} reads the held-out domain, which settings must not be tuned "
        "on: write protocol.selection=validation",
    )


def objective(report: Report) -> float:
    """Validation accuracy of what the rule selects, the mean over folds and seeds."""
    picked = {(r.held_out, r.seed): r for r in Table(finished([report])).results}  # `selected` last
    return sum(r.validation for r in picked.values()) / len(picked)
