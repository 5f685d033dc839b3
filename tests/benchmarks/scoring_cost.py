"""What an evaluation of K candidates costs: one pass of loading and K forward passes?

For K = 1, 4 and 8 the whole of `Scorer.score` is timed, on splits that are gathered from the cache
(`mapped`) and on ones that are copied (`held`), against two things done alone: bringing all batches
to floats (`loading`) and passing them through one model (`forward`). `excess` is what is left of
an evaluation without one loading and K forward passes. Candidates have weights of their own and
keep their statistics, so none is recalibrated. One thread; rounds are interleaved in one process.
Processor time of all threads, since a thread loads while another computes; medians.

    python tests/benchmarks/scoring_cost.py [FOLDER] [--size 112] [--rounds 5] [--images 500]

FOLDER is a tree domain/class/image, read by ResNet-18; without one only the digits are, by `cnn`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from dgavg.benchmark.scored import splits_to_score
from dgavg.data import Splits, load, make_splits
from dgavg.evaluation import Scorer
from dgavg.models import build_model
from dgavg.trainer import Candidate

PROTOCOL = {"test_split": "all", "selection": "validation"}
CPU, BATCH = torch.device("cpu"), 64


def seconds(work):
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def candidates_of(model, k):
    """K sets of weights that differ."""
    found = {}
    for i in range(k):
        weights = {n: v.clone() for n, v in model.state_dict().items()}
        next(v for v in weights.values() if v.is_floating_point()).mul_(1 + i / 100)
        found[str(i)] = Candidate(weights)
    return found


@torch.no_grad()
def forward_alone(model, batches):
    for images in batches:
        model(images)


def measure(title, dataset, name, rounds, images):
    model = build_model(name, dataset.input_shape, len(dataset.classes)).eval()
    splits = some(make_splits(dataset, 0.2, 0), images)
    parts = {
        kind: splits_to_score(dataset, splits, [0], PROTOCOL, CPU, resident=kind == "held")
        for kind in ("mapped", "held")
    }
    n = sum(len(split) for split in parts["held"].values())
    scorer = Scorer(model, parts["held"], list, batch_size=BATCH)
    loaded = [images for _, images, _ in scorer._batches()]
    works = {("forward", 1): lambda: forward_alone(model, loaded)}
    for kind, found in parts.items():
        scorer = Scorer(model, found, list, batch_size=BATCH)
        works[f"{kind} loading", 1] = lambda s=scorer: [None for _ in s._batches()]
        for k in (1, 4, 8):
            wanted = candidates_of(model, k)
            works[kind, k] = lambda s=scorer, w=wanted: s.score(w)
    times = {key: [] for key in works}
    for turn in range(rounds + 1):
        for key, work in works.items():
            found = seconds(work)
            if turn:  # the first warms up
                times[key].append(found)
    wall, cpu = (
        {k: 1000 * statistics.median(v[i] for v in found) for k, found in times.items()}
        for i in (0, 1)
    )
    print(f"\n{title}: {n} images of {tuple(dataset.input_shape)}, {name}; milliseconds")
    forward = cpu["forward", 1]
    print(f"{'':10}{'K':>3}{'loading':>10}{'K forward':>11}{'whole':>10}{'excess':>9}{'wall':>10}")
    for kind in parts:
        loading = cpu[f"{kind} loading", 1]
        for k in (1, 4, 8):
            whole = cpu[kind, k]
            excess = (whole - loading - k * forward) / whole
            line = f"{loading:10.1f}{k * forward:11.1f}{whole:10.1f}{excess:9.1%}"
            print(f"{kind:10}{k:3}{line}{wall[kind, k]:10.1f}")


def some(splits, n):
    """At most n images of each part of each domain."""
    return Splits(*(tuple(keys[:n] for keys in part) for part in (splits.out, splits.in_)))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=500)
    options = parser.parse_args()
    torch.set_num_threads(1)
    measure("digits_rotated", load("digits_rotated"), "cnn", 3 * options.rounds, 10**6)
    if options.folder is not None:
        names = sorted(p.name for p in options.folder.iterdir() if any(p.glob("*/*.jpg")))
        with tempfile.TemporaryDirectory() as place:
            data = load(
                "folder", root=str(options.folder), size=options.size, domains=names, cache=place
            )
            measure(options.folder.name, data, "resnet18", options.rounds, options.images)


if __name__ == "__main__":
    main()
