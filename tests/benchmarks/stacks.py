"""What a step of R runs costs, one by one and in a stack.

Random images of 3 domains, SGD: the MLP on 1×28×28 with 8 rows a domain, DomainBed's MNIST CNN on
2×28×28 with 8, ResNet-18 on 3×32×32 with 8. In every round each takes its step in turn: R runs one
after the other, then the stack of the same R models. Medians over rounds, in milliseconds for all R
runs, of one thread's CPU time, or on a GPU of wall time until it is done.

    python tests/benchmarks/stacks.py [--device cpu|cuda] [--model mlp|cnn|resnet18 ...]
        [--runs 2 6 18] [--rows 8] [--precision fp32|bf16] [--rounds 9]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch

from dgavg import Batch, Run
from dgavg.fit import step
from dgavg.models import build_model
from dgavg.models.model import lay_out
from dgavg.models.stack import Stack
from dgavg.stacked import StackedRun

SHAPES = {"mlp": (1, 28, 28), "cnn": (2, 28, 28), "resnet18": (3, 32, 32)}
CLASSES, DOMAINS = 10, 3


class Pictures:
    """One batch of random images for each of several runs, forever."""

    classes, epoch_length = CLASSES, 100

    def __init__(self, shape, rows, runs, device):
        domains = runs * DOMAINS
        self.names = tuple(map(str, range(domains)))
        n = domains * rows
        self.batch = Batch(
            torch.rand(n, *shape, device=device),
            torch.randint(CLASSES, (n,), device=device),
            torch.arange(domains, device=device).repeat_interleave(rows),
            domains,
            torch.full((domains,), 1 / DOMAINS, device=device),
        )

    def __call__(self, t):
        return self.batch


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=1e-4, momentum=0.9, fused=True)


def build(name, runs, options):
    """The runs, one by one, and their stack."""
    shape, device = SHAPES[name], torch.device(options.device)
    models = [build_model(name, shape, CLASSES) for _ in range(runs)]
    settings = {"steps": 10_000, "optimizer": sgd, "precision": options.precision}

    def batches(count):
        return Pictures(shape, options.rows, count, device)

    alone = []
    for model in copy.deepcopy(models):
        model.to(device)
        lay_out(model)
        alone.append(Run("basic", model, batches(1), **settings))
    stack = Stack(models).to(device)
    return alone, StackedRun("basic", stack, batches(runs), **settings)


def milliseconds(runs, device):
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    for run in runs:
        step(run)
    if device != "cpu":
        torch.cuda.synchronize()
    return 1000 * (clock() - start)


def measure(name, runs, options):
    """Milliseconds of each round, one by one and stacked."""
    alone, stacked = build(name, runs, options)
    works = alone, [stacked]
    for work in works * 2:
        milliseconds(work, options.device)
    return [[milliseconds(w, options.device) for w in works] for _ in range(options.rounds)]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--runs", nargs="+", type=int, default=[2, 6, 18])
    parser.add_argument("--rows", type=int, default=8, help="of each domain")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| model | runs | one by one, ms | stacked, ms | one by one / stacked |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name in options.model:
        for runs in options.runs:
            rounds = measure(name, runs, options)
            alone, stacked = (statistics.median(each) for each in zip(*rounds, strict=True))
            low, *_, high = statistics.quantiles([a / b for a, b in rounds], n=10)
            ratio = statistics.median(a / b for a, b in rounds)
            cells = f"{alone:.1f} | {stacked:.1f} | {ratio:.2f} ({low:.2f} to {high:.2f})"
            print(f"| {name} | {runs} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
