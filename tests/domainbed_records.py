"""Toy folders of DomainBed runs, the same on every machine."""

from __future__ import annotations

import itertools
import json
import random

COUNTS = {
    "ColoredMNIST": 3,
    "RotatedMNIST": 6,
    "VLCS": 4,
    "PACS": 4,
    "DomainNet": 6,
    "SVIRO": 10,
    "WILDSCamelyon": 5,
    "SpawriousO2O_medium": 3,
    "Mine": 3,
}


class Folder:
    """Runs by what tells them apart; `write(path)` makes a folder of each."""

    def __init__(self, seed=0):
        self.rng = random.Random(seed)
        self.runs = {}

    def run(
        self,
        dataset,
        algorithm,
        test_envs,
        trial=0,
        hparams=0,
        steps=(0, 3, 6),
        copy=0,
        domains=None,
    ):
        """Add a run with random accuracies; returns its records."""
        args = {
            "dataset": dataset,
            "algorithm": algorithm,
            "test_envs": list(test_envs),
            "trial_seed": trial,
            "hparams_seed": hparams,
            "holdout_fraction": 0.2,
        }
        records = [
            {"args": args, "step": step, "epoch": step / 7, "hparams": {}, "loss": 1.0}
            | {
                f"env{i}_{part}_acc": self.rng.random()
                for i in range(domains or COUNTS[dataset])
                for part in ("in", "out")
            }
            for step in steps
        ]
        name = f"{dataset}-{algorithm}-{'+'.join(map(str, test_envs))}-{trial}-{hparams}-{copy}"
        self.runs[name] = records
        return records

    def sweep(self, dataset, algorithm, *, trials=1, hparams=1, pairs=False, without=(), **more):
        """Runs of all test domains (and pairs) but those of `without`."""
        n = COUNTS[dataset]
        envs = [(i,) for i in range(n)] + (list(itertools.combinations(range(n), 2)) * pairs)
        for trial, draw, test_envs in itertools.product(range(trials), range(hparams), envs):
            if test_envs not in without:
                self.run(dataset, algorithm, test_envs, trial, draw, **more)

    def write(self, path):
        """Folders of `results.jsonl`, as DomainBed leaves them, and things it passes over."""
        for name, records in self.runs.items():
            (path / name).mkdir(parents=True)
            text = "".join(json.dumps(r, sort_keys=True) + "\n" for r in records)
            (path / name / "results.jsonl").write_text(text)
        (path / "launched").mkdir()
        (path / "results.txt").write_text("the tables of another day\n")
        return path


def pairs():
    """Pairs of test domains: read by the second rule, passed over by the others."""
    folder = Folder(1)
    folder.sweep("PACS", "ERM", trials=3, hparams=3, pairs=True)
    folder.sweep("PACS", "IRM", trials=2, hparams=2, pairs=True, without=[(0, 2)])
    folder.sweep("PACS", "Fish", pairs=True, without=[(1,)])
    return folder


def gaps():
    """Data sets and algorithms, known and not, some of them without runs of some domains."""
    folder = Folder(2)
    folder.sweep("VLCS", "OfMyOwn", trials=2)
    folder.sweep("PACS", "OfMyOwn", trials=3, without=[(2,), (3,)])
    folder.sweep("PACS", "ERM", trials=2, hparams=2)
    folder.sweep("Mine", "SagNet", trials=3)
    folder.run("PACS", "MMD", [4], domains=5)  # in no column, and yet in the averages
    folder.run("VLCS", "MMD", [1], trial=0)
    folder.run("VLCS", "MMD", [1], trial=2)
    folder.run("VLCS", "MMD", [3], trial=2)
    return folder


def ties():
    """Equal scores: the first checkpoint counts, and the largest `hparams_seed`."""
    folder = Folder(3)
    for env, draw in itertools.product(range(4), range(3)):
        for i, record in enumerate(folder.run("VLCS", "ERM", [env], 0, draw, steps=(0, 1, 2, 3))):
            level = 0.5 if i in (1, 2) else 0.25
            record.update({k: level for k in record if k.endswith("_out_acc")})
    for env, draw in itertools.product(range(4), (1, 11, 2)):
        for record in folder.run("VLCS", "IRM", [env], 1, draw):
            record.update({k: 1.0 for k in record if k.endswith("_out_acc")})
    for pair in itertools.combinations(range(4), 2):
        for record in folder.run("VLCS", "ERM", pair, 0, 1, steps=(0, 1, 2, 3)):
            record.update({k: 0.75 for k in record if k.endswith("_in_acc")})
    return folder


def steps():
    """Checkpoints out of order, runs of unequal length, and a run that is there twice."""
    folder = Folder(4)
    folder.sweep("ColoredMNIST", "VREx", trials=2, pairs=True, steps=(300, 0, 1200, 600, 900))
    for draw in range(3):
        folder.sweep("ColoredMNIST", "ERM", trials=draw + 1, steps=tuple(range(4 + draw)))
    folder.sweep("RotatedMNIST", "ERM", pairs=True, without=[(0,)], steps=(0, 5))
    folder.run("RotatedMNIST", "ERM", [0], steps=(0, 5))
    folder.run("RotatedMNIST", "ERM", [0], steps=(5, 10), copy=1)
    return folder


def wide():
    """Many domains, names longer than their columns, every order of data sets and algorithms."""
    folder = Folder(5)
    for dataset in ("WILDSCamelyon", "SpawriousO2O_medium", "SVIRO", "DomainNet", "ColoredMNIST"):
        folder.sweep(dataset, "URM", trials=2, steps=(0,))
        folder.sweep(dataset, "ERMPlusPlus", steps=(0, 1))
    folder.sweep("SVIRO", "CausIRL_CORAL", pairs=True, steps=(0,))
    folder.sweep("SVIRO", "AnAlgorithmOfMyOwnWithALongName", steps=(0,))
    return folder


CASES = {case.__name__: case for case in (pairs, gaps, ties, steps, wide)}
