"""Multi-domain data sets: loading them by name, splitting them, and drawing training batches."""

from dgavg.data import (  # noqa: F401 (each registers its data sets)
    benchmarks,
    digits,
    features,
    folder,
    hub,
    spawrious,
    wilds,
)
from dgavg.data.augment import AUGMENTATIONS
from dgavg.data.domains import Domain, DomainDataset
from dgavg.data.registry import DATASETS, dataset, load
from dgavg.data.sampler import TrainingBatches
from dgavg.data.splits import Splits, make_splits, seed_hash, split_keys

__all__ = [
    "AUGMENTATIONS",
    "DATASETS",
    "Domain",
    "DomainDataset",
    "Splits",
    "TrainingBatches",
    "dataset",
    "load",
    "make_splits",
    "seed_hash",
    "split_keys",
]
