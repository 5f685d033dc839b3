"""Small runs of several networks, alone and in a stack."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import torch

from dgavg import chain
from dgavg.benchmark.experiment import experiments
from dgavg.config import compose, plain
from dgavg.data import Domain, DomainDataset, TrainingBatches, make_splits
from dgavg.data.stacked import StackedBatches
from dgavg.models import build_model

FOLDS = [(0, 0), (1, 0), (2, 5)]  # held out, seed
SHAPES = {"mlp": (1, 2, 3), "cnn": (1, 6, 6), "resnet18": (3, 16, 16)}
MODELS = {"mlp": {"width": 8}, "cnn": {"batchnorm": True}, "resnet18": {}}
SETTINGS = {
    "sma": {"start": 2},
    "ema": {"decay": 0.7},
    "swa": {"start": 0.2},
    "lawa": {"start": 0, "k": 2},
    "posthocema": {"start": 0},
    "mmd": {"weight": 0.1},  # its kernel makes much of what rounding does to small distances
    "irm": {"weight": 3.0, "anneal": 2},
    "vrex": {"weight": 3.0, "anneal": 2},
    "ibirm": {"weight": 0.1, "irm_weight": 0.5, "irm_anneal": 1, "anneal": 2},
    "iberm": {"weight": 0.1, "anneal": 2},
}


def toy(network="mlp"):
    random = torch.Generator().manual_seed(0)

    def domain(name):
        images = torch.randint(0, 256, (15, *SHAPES[network]), generator=random).to(torch.uint8)
        return Domain(name, images, torch.randint(0, 3, (15,), generator=random))

    return DomainDataset("toy", tuple(map(domain, "abcd")), ("x", "y", "z"))


def model_of(network, seed):
    torch.manual_seed(seed)
    return build_model(network, SHAPES[network], 3, **MODELS[network]).train()


def parts(dataset, network="mlp"):
    """Batches and model of each run."""
    found = []
    for held_out, seed in FOLDS:
        splits = make_splits(dataset, 0.2, trial_seed=seed)
        train = [i for i in range(4) if i != held_out]
        batches = TrainingBatches(dataset, splits, train, batch_size=4, seed=seed, device="cpu")
        found.append((batches, model_of(network, seed)))
    return found


def side_by_side(dataset, made):
    return StackedBatches(dataset, [b for b, _ in made], ["p", "q", "r"], torch.device("cpu"))


class Doubled:
    """Batches in float64, which says whether a difference is rounding."""

    def __init__(self, batches):
        self.batches = batches
        self.names, self.classes = batches.names, batches.classes
        self.epoch_length = batches.epoch_length

    def __call__(self, t):
        batch = self.batches(t)
        return replace(batch, x=batch.x.double())


def sgd(parameters, lr=0.1):
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def links(name):
    spec = name if name == "basic" else f"{name}_basic"
    return chain(spec, **({name: SETTINGS[name]} if name in SETTINGS else {}))


def settings(tmp_path, *words, network="mlp"):
    """An experiment of four runs: an MLP on digits, or another network on toy data."""
    given = [
        "trainer=sma_swa_irm_basic",
        "trainer.sma.start=5",
        "trainer.irm.anneal=10",
        "trainer.irm.weight=1",
        "protocol.steps=31",
        "protocol.eval_every=10",
        "protocol.batch_size=8",
        "optimizer=sgd",
        "optimizer.lr=0.02",
        "also_batchnorm=[keep]",
        "seeds=[0,3]",
        "holdout=[0,45]",
        f"runs={tmp_path}",
    ]
    if network == "mlp":
        return experiments(plain(compose([*given, *words])))[0]
    given += [f"model={network}", "optimizer.lr=0.0001", "holdout=[a,c]", "eval_batch_size=16"]
    given += [f"model.{key}={value}" for key, value in MODELS[network].items()]
    return experiments(plain(compose([*given, *words])), dataset=toy(network))[0]


def records(experiment):
    """Of each run, all that is the same in every repetition."""
    found = {}
    for fold, seed in itertools.product(experiment.folds, experiment.seeds):
        lines = (experiment.run_folder(fold, seed) / "records.jsonl").read_text().splitlines()
        found[fold, seed] = [json.loads(line) for line in lines]
        for record in found[fold, seed]:
            del record["timing"]
    return found
