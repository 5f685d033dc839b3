"""What a chain costs a step beyond the work itself: dgavg against a plain loop, interleaved.

Both do the same arithmetic on the same batches: forward, backward, optimizer. `chain` runs it
through `Run.step` with the loop's bookkeeping (loss log, taps); `plain` is the loop one would write
by hand. `empty_basic` decorates `basic` with links that do nothing, to price the decoration alone.

    python tests/benchmarks/chain_overhead.py [--model resnet18] [--size 64] [--rounds 15]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from dgavg import Batch, Run, Trainer, chain, trainer
from dgavg.models import build_model


@trainer("empty")
class Empty(Trainer):
    """Passes every call on."""

    def loss(self, run, batch):
        return self.inner.loss(run, batch)

    def grad(self, run, batch):
        return self.inner.grad(run, batch)

    def after_step(self, run):
        pass


class Fixed:
    """One batch, forever."""

    classes, epoch_length = 10, 100

    def __init__(self, shape, domains, rows):
        self.names = tuple(str(i) for i in range(domains))
        random = torch.Generator().manual_seed(0)
        n = domains * rows
        self.batch = Batch(
            torch.rand(n, *shape, generator=random),
            torch.randint(10, (n,), generator=random),
            torch.arange(domains).repeat_interleave(rows),
            domains,
        )

    def __call__(self, t):
        return self.batch


def plain_step(model, optimizer, batch):
    optimizer.zero_grad()
    F.cross_entropy(model(batch.x), batch.y).backward()
    optimizer.step()


def chain_step(run):
    run.losses.write(run.step(run.batches(run.t)))
    run.t += 1
    run.tap("after_step")
    if run.t % 50 == 0:
        run.losses.flush(run.t)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    shape = (3, options.size, options.size)
    batches = Fixed(shape, domains=4, rows=8)

    def adam(parameters):
        return torch.optim.Adam(parameters, lr=1e-4, fused=True)

    torch.manual_seed(0)
    model = build_model(options.model, shape, 10)
    optimizer = adam(model.parameters())
    work = {"plain": lambda: plain_step(model, optimizer, batches.batch)}
    for spec in ("basic", "empty_basic"):
        torch.manual_seed(0)
        run = Run(
            chain(spec), build_model(options.model, shape, 10), batches, steps=10**9, optimizer=adam
        )
        work[spec] = lambda run=run: chain_step(run)

    times = {name: [] for name in work}
    for round_ in range(options.rounds + 2):
        for name in sorted(work, key=lambda n: hash((n, round_))):
            start = time.process_time()
            for _ in range(options.steps):
                work[name]()
            if round_ >= 2:
                times[name].append((time.process_time() - start) / options.steps)
    ratios = {k: [a / b for a, b in zip(v, times["plain"], strict=True)] for k, v in times.items()}
    print(f"{options.model}, {shape}, 32 images a step, 1 CPU thread, CPU time, medians")
    for name, values in times.items():
        low, *_, high = statistics.quantiles(ratios[name], n=10)
        print(
            f"{name:12} {1000 * statistics.median(values):9.3f} ms/step  "
            f"{100 * (statistics.median(ratios[name]) - 1):+6.2f} % of plain  "
            f"(80 % of rounds: {100 * (low - 1):+.2f} to {100 * (high - 1):+.2f})"
        )


if __name__ == "__main__":
    main()
