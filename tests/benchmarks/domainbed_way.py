"""What runs cost here, in a plain loop, and the way DomainBed's `train.py` goes about them.

DomainBed's way: a loader a domain (0 workers), Adam as torch makes it by default, a loss fetched
every step, and every part of every domain scored at each evaluation. Same model, batch sizes,
splits and steps. Three tables:

- `step`: one update of DomainBed's MNIST CNN: the plain loop has the batch in memory already.
- `fold`: one leave-one-domain-out run of that CNN, whole, files and all: with one average, and with
  eight, for which DomainBed needs eight runs. An evaluation comes after as many training images as
  in DomainBed's RotatedMNIST, relative to the images scored.
- `sweep`: an MLP on six folds and three seeds, as separate runs and stacked; and the products,
  norms and optimizer of such a stack alone.

Rounds are interleaved; one thread, processor time, medians, and the range of all rounds.
DomainBed's way has a process of its own, whose C library's allocator is as it comes.

    python tests/benchmarks/domainbed_way.py [step] [fold] [sweep] [--rounds 3]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context

import torch
import torch.nn.functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Subset, TensorDataset

from dgavg import Run, chain
from dgavg.allocator import keep_memory
from dgavg.benchmark.leave_one_out import leave_one_domain_out
from dgavg.data import TrainingBatches, load, make_splits
from dgavg.models import build_model
from dgavg.models.stack import _Products
from dgavg.optimizers import optimizer_factory

BASE = "DomainBed's way"
ONE, EIGHT = "ema_basic", "sma_ema_swa_lawa_swad_posthocema_basic"  # the last link has three
CNN = {"rows": 32, "steps": 30, "every": 5, "lr": 1e-3}
MLP = {"rows": 8, "steps": 301, "every": 100, "lr": 1e-2}


class Forever:
    """DomainBed's `_InfiniteSampler`, in short."""

    def __init__(self, sampler):
        self.sampler = sampler

    def __iter__(self):
        while True:
            yield from self.sampler


def forever(data, rows):
    batches = BatchSampler(RandomSampler(data, replacement=True), rows, drop_last=True)
    return iter(DataLoader(data, batch_sampler=Forever(batches), num_workers=0))


class DomainBedRun:
    """One run as DomainBed's `train.py` does it, without its files."""

    def __init__(self, dataset, name, held_out, seed, rows, lr):
        torch.manual_seed(seed)
        tensors = [TensorDataset(d.images.float() / 255, d.labels) for d in dataset.domains]
        splits = make_splits(dataset, 0.2, trial_seed=seed)
        parts = {
            part: [Subset(t, k.tolist()) for t, k in zip(tensors, keys, strict=True)]
            for part, keys in (("in", splits.in_), ("out", splits.out))
        }
        train = [data for i, data in enumerate(parts["in"]) if i != held_out]
        self.minibatches = zip(*(forever(data, rows) for data in train), strict=True)
        self.evals = [DataLoader(data, batch_size=64) for data in (*parts["in"], *parts["out"])]
        self.model = build_model(name, dataset.input_shape, len(dataset.classes))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=lr)

    def step(self):
        pairs = next(self.minibatches)
        x, y = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        loss = F.cross_entropy(self.model(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    @torch.no_grad()
    def evaluate(self):
        self.model.eval()
        for loader in self.evals:
            right = sum((self.model(x).argmax(1) == y).float().sum().item() for x, y in loader)
            assert right >= 0
        self.model.train()

    def train(self, steps, every):
        for t in range(1, steps + 1):
            self.step()
            if t % every == 0 or t == steps:
                self.evaluate()


def ours(spec, dataset, model, precision, cost, **more):
    def work():
        with tempfile.TemporaryDirectory() as folder:
            leave_one_domain_out(
                spec,
                dataset,
                model=model,
                runs=folder,
                quiet=True,
                settings={
                    "optimizer.lr": cost["lr"],
                    "protocol.steps": cost["steps"],
                    "protocol.eval_every": cost["every"],
                    "protocol.batch_size": cost["rows"],
                    "precision": precision,
                    "threads": 1,
                    **more,
                },
            )

    return work


@cache
def their_run():
    return DomainBedRun(load("digits_rotated", size=28), "cnn", 0, 0, 64, CNN["lr"])


def their_step():
    their_run().step()


def their_fold():
    dataset = load("digits_rotated", size=28)
    run = DomainBedRun(dataset, "cnn", 0, 0, CNN["rows"], CNN["lr"])
    run.train(CNN["steps"], CNN["every"])


def their_sweep():
    dataset = load("digits_rotated")
    for held_out in range(6):
        for seed in range(3):
            run = DomainBedRun(dataset, "mlp", held_out, seed, MLP["rows"], MLP["lr"])
            run.train(MLP["steps"], MLP["every"])


def bare_sweep():
    """The arithmetic of 18 MLPs side by side in bf16, without a run around it: random images."""
    runs, rows, width = 18, 5 * MLP["rows"], 256
    sizes = [(width, width), (width, width), (10, width)]
    layers = [[0.05 * torch.randn(runs, *s), torch.zeros(runs, s[0])] for s in sizes]
    norms = [[torch.ones(runs * width), torch.zeros(runs * width)] for _ in sizes[1:]]
    weights = [w.requires_grad_() for group in (*layers, *norms) for w in group]
    adam = torch.optim.Adam(weights, lr=MLP["lr"], fused=True)
    images, labels = torch.rand(1797, width), torch.randint(10, (1797,))
    for _ in range(MLP["steps"]):
        drawn = torch.randint(1797, (runs * rows,))
        x = images[drawn].view(runs, rows, width)
        with torch.autocast("cpu", torch.bfloat16):
            for (weight, bias), norm in zip(layers, (*norms, None), strict=True):
                x = _Products.apply(x, weight, bias)
                if norm is not None:
                    flat = x.transpose(0, 1).reshape(rows, -1)
                    x = F.batch_norm(flat, None, None, *norm, training=True).relu()
                    x = x.view(rows, runs, width).transpose(0, 1).contiguous()
        loss = F.cross_entropy(x.float().flatten(0, 1), labels[drawn], reduction="sum") / rows
        adam.zero_grad()
        loss.backward()
        adam.step()


def seconds(work):
    torch.set_num_threads(1)
    start = time.process_time()
    work()
    return time.process_time() - start


def measured(theirs, works, rounds, warm=0):
    """Seconds of every round by name; `warm` rounds before them count for nothing."""
    times = {name: [] for name in (BASE, *works)}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart:
        for round_ in range(-warm, rounds):
            names = list(times)
            for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
                found = (
                    apart.submit(seconds, theirs).result() if name == BASE else seconds(works[name])
                )
                if round_ >= 0:
                    times[name].append(found)
    return times


def show(title, times, factor=1, images=None):
    print(f"\n{title}")
    for name, values in times.items():
        times_more = 1 if name == BASE else factor
        ratios = [times_more * b / v for b, v in zip(times[BASE], values, strict=True)]
        middle = statistics.median(values)
        rate = f"  {images / middle:7.0f} images/s" if images else ""
        spread = f"({min(ratios):.2f} to {max(ratios):.2f})"
        cheaper = f"{statistics.median(ratios):6.2f} times cheaper {spread}"
        print(f"  {name:62} {middle:9.4f} s{rate}  {cheaper}")


def step(rounds):
    dataset = load("digits_rotated", size=28)
    splits = make_splits(dataset, 0.2, trial_seed=0)
    domains, rows = range(1, 6), 64
    adam = optimizer_factory("adam", lr=1e-3)

    def batches():
        return TrainingBatches(dataset, splits, domains, batch_size=rows, seed=0, device="cpu")

    model = build_model("cnn", dataset.input_shape, 10)
    optimizer, batch = adam(model.parameters()), batches()(0)

    def plain():
        optimizer.zero_grad()
        F.cross_entropy(model(batch.x), batch.y).backward()
        optimizer.step()

    keep_memory()
    works = {"plain loop": plain}
    for precision in ("fp32", "bf16"):
        for spec in ("basic", ONE):
            network = build_model("cnn", dataset.input_shape, 10)
            run = Run(
                chain(spec),
                network,
                batches(),
                steps=10**6,
                optimizer=adam,
                precision=precision,
            )

            def one(run=run):
                run.losses.write(run.step(run.batches(run.t)))
                run.t += 1
                run.tap("after_step")

            works[f"dgavg {spec} {precision}"] = one
    times = measured(their_step, works, rounds, warm=2)
    show("one step, 5 domains of 64 images of 28×28, MNIST CNN", times, 1, 320)


def fold(rounds):
    dataset = load("digits_rotated", size=28)
    cost = CNN
    works, eight = {}, {}
    for precision in ("fp32", "bf16"):
        name = f"dgavg {precision}"
        more = {"seeds": [0], "holdout": ["0"]}
        late = {"trainer.sma.start": 0.02, "protocol.name": "eight"}
        ways = [{}, {"evaluate": "picked"}]
        if precision == "fp32":
            ways.append({"evaluate": "picked", "scoring": "bf16"})
        for way in ways:
            label = " ".join([name, *(f"{k}={v}" for k, v in way.items())])
            works[label] = ours(ONE, dataset, "cnn", precision, cost, **more, **way)
            eight[label] = ours(EIGHT, dataset, "cnn", precision, cost, **more, **late, **way)
        for way in ways[1:]:  # of averages the end is what counts
            at_end = {**way, "protocol.selection": "last"}
            label = " ".join([name, *(f"{k}={v}" for k, v in at_end.items())])
            eight[label] = ours(EIGHT, dataset, "cnn", precision, cost, **more, **late, **at_end)
        for way in ways[1:]:  # as DomainBed's way, one set of weights
            label = " ".join([name, *(f"{k}={v}" for k, v in way.items()), "candidates=[ema]"])
            alone = {**more, **way, "candidates": ["ema"]}
            works[label] = ours(ONE, dataset, "cnn", precision, cost, **alone)
    every = {**works, **{f"8 {k}": v for k, v in eight.items()}}
    times = measured(their_fold, every, rounds)
    single = {k: v for k, v in times.items() if not k.startswith("8 ")}
    show("one fold, one average, MNIST CNN", single)
    many = {BASE: times[BASE], **{k: times[f"8 {k}"] for k in eight}}
    show("one fold, eight averages against eight DomainBed runs, MNIST CNN", many, 8)


def sweep(rounds):
    dataset = load("digits_rotated")
    cost, works = MLP, {}
    for precision in ("fp32", "bf16"):
        for stack in (1, 9, 18):
            works[f"dgavg {precision} stack={stack}"] = ours(
                "basic", dataset, "mlp", precision, cost, stack=stack
            )
    works["the arithmetic of stack=18 alone, bf16"] = bare_sweep
    show("18 runs of an MLP", measured(their_sweep, works, rounds))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", nargs="*", default=["step", "fold", "sweep"])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tables = {"step": step, "fold": fold, "sweep": sweep}
    for name in options.tables:
        tables[name](options.rounds * (5 if name == "step" else 1))


if __name__ == "__main__":
    main()
