"""What a step of each link costs, relative to `basic`.

One process, one thread, CPU time; in every round each link takes one step right after a step of
`basic`, and figures are medians of those ratios. Random images of 3 domains: 28×28 with 2 channels
through DomainBed's MNIST CNN, 32 a domain; 64×64 through ResNet-18, 8 a domain. Default settings,
but for mixstyle, which mixes the images; steps in the middle of a run, so that annealed penalties
have their full weight; averages at the steps where they only update.

    python tests/benchmarks/links.py [--rounds 9] [--only NAME ...] [--model cnn|resnet18]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from dgavg import Batch, Run, UserError, chain
from dgavg.cards import PLANES, card
from dgavg.chain import known_trainers
from dgavg.models import build_model

MODELS = {"cnn": ((2, 28, 28), 32), "resnet18": ((3, 64, 64), 8)}
SETTINGS = {"mixstyle": {"layers": ["input"]}, "autolr": {"candidate": "live"}}
STEPS, MIDDLE = 100_000, 50_001


class Pictures:
    """One batch of random images, forever."""

    names, classes, epoch_length = ("a", "b", "c"), 10, 100

    def __init__(self, shape, rows):
        random = torch.Generator().manual_seed(0)
        n = 3 * rows
        x = torch.rand(n, *shape, generator=random)
        y = torch.randint(10, (n,), generator=random)
        self.batch = Batch(x, y, torch.arange(3).repeat_interleave(rows), 3)

    def __call__(self, t):
        return self.batch


def build(spec, model, shape, batches):
    torch.manual_seed(0)
    settings = {k: v for k, v in SETTINGS.items() if k in spec.split("_")}
    run = Run(
        chain(spec, **settings),
        build_model(model, shape, batches.classes),
        batches,
        steps=STEPS,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-6, fused=True),
        evaluate=lambda run: {},  # some links look for validation scores; no step evaluates
        eval_every=1000,
    )
    run.t = MIDDLE
    return run


def seconds(run):
    """CPU seconds of one step, with what the loop does after it."""
    start = time.process_time()
    run.losses.write(run.step(run.batches(run.t)))
    run.t += 1
    run.tap("after_step")
    return time.process_time() - start


def measure(spec, model, rounds):
    """Median over rounds of a step's CPU time, and of its ratio to one of `basic` beside it."""
    shape, rows = MODELS[model]
    batches = Pictures(shape, rows)
    run, basic = (build(s, model, shape, batches) for s in (spec, "basic"))
    for each in (run, basic):
        for _ in range(2):
            seconds(each)
    found = []
    for i in range(rounds):
        first, second = (run, basic) if i % 2 else (basic, run)
        a, b = seconds(first), seconds(second)
        found.append((a, b) if first is run else (b, a))
    ratios = [mine / theirs for mine, theirs in found]
    return statistics.median(t for t, _ in found), statistics.median(ratios)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--model", choices=MODELS, action="append")
    options = parser.parse_args()
    torch.set_num_threads(1)
    models = options.model or list(MODELS)
    names = options.only or sorted(known_trainers(), key=lambda n: (PLANES.index(card(n).plane), n))
    print("| link | " + " | ".join(f"{m}, ms | × basic" for m in models) + " |")
    print("| --- |" + " ---: | ---: |" * len(models))
    for name in names:
        cells = []
        for model in models:
            try:
                spec = name if name == "basic" else f"{name}_basic"
                milliseconds, ratio = measure(spec, model, options.rounds)
                cells += [f"{1000 * milliseconds:.1f}", f"{ratio:.2f}"]
            except UserError as error:
                cells += ["—", str(error)]
        print(f"| `{name}` | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
