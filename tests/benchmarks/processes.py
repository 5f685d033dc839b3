"""What a step costs on two processes: dgavg's against one in DistributedDataParallel.

Two gloo processes of one thread each on this machine; ResNet-18, random images of 64×64, 3 domains,
SGD. In every round each takes one step, in turn, so both see the same machine: `basic` of dgavg
(outputs gathered, gradients in buckets, statistics averaged, losses noted, taps), a plain loop
around the wrapper, and a plain loop on one process's rows without any message. Wall time, medians
over rounds; a step begins when both processes are there.

    python -m torch.distributed.run --nproc-per-node 2 tests/benchmarks/processes.py
        [--rounds 25] [--rows 8]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from dgavg import Batch, Run
from dgavg.distributed import is_first, rank, together
from dgavg.fit import step
from dgavg.models import build_model

SHAPE, CLASSES, DOMAINS = (3, 64, 64), 10, 3


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)


class Pictures:
    """One batch of random images, forever: this process's rows."""

    names, classes, epoch_length = ("a", "b", "c"), CLASSES, 100

    def __init__(self, rows):
        random = torch.Generator().manual_seed(rank())
        n = DOMAINS * rows
        x = torch.rand(n, *SHAPE, generator=random)
        y = torch.randint(CLASSES, (n,), generator=random)
        self.batch = Batch(x, y, torch.arange(DOMAINS).repeat_interleave(rows), DOMAINS)

    def __call__(self, t):
        return self.batch


def plain_step(model, batch):
    """A function that takes one step of a plain loop."""
    optimizer = sgd(model.parameters())

    def one():
        optimizer.zero_grad()
        F.cross_entropy(model(batch.x), batch.y).backward()
        optimizer.step()

    return one


def seconds(work):
    dist.barrier()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(rounds, rows):
    """Seconds of each kind of step, by round."""
    batches = Pictures(rows)

    def model():
        torch.manual_seed(0)
        return build_model("resnet18", SHAPE, CLASSES)

    run = Run("basic", model(), batches, steps=10_000, optimizer=sgd)
    works = {
        "dgavg": lambda: step(run),
        "DistributedDataParallel": plain_step(DistributedDataParallel(model()), batches.batch),
        "no messages": plain_step(model(), batches.batch),
    }
    for work in works.values():
        for _ in range(2):
            work()
    return [{name: seconds(work) for name, work in works.items()} for _ in range(rounds)]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--rows", type=int, default=8, help="of each domain, in each process")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with together():
        found = measure(options.rounds, options.rows)
        if is_first():
            for name in found[0]:
                each = [1000 * row[name] for row in found]
                ratios = [row[name] / row["DistributedDataParallel"] for row in found]
                low, *_, high = statistics.quantiles(ratios, n=10)
                print(
                    f"{name:24} {statistics.median(each):7.1f} ms  "
                    f"{statistics.median(ratios):.3f} of DDP ({low:.3f} to {high:.3f})"
                )


if __name__ == "__main__":
    main()
