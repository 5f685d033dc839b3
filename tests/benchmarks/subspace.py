"""What training in a span of weights costs: `WeightSubspace` against the two public codes of TWA.

Basis: Gram matrix and its eigenvectors, against a singular value decomposition of the centred
samples (dicee; `K x D` as there, and of the transpose) and Gram-Schmidt (nblt/TWA). Step: project
the gradients of the model and write the new average into it, against `P^T P g` on vectors alone,
and against nblt's whole step (gradients to a vector, `P^T P g`, back, SGD with momentum). Samples
are a random walk with steps of 5 % of the weights. One thread, CPU time, interleaved in one
process, medians.

    python tests/benchmarks/subspace.py [--rounds 20]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import resnet18, resnet50

from dgavg.averaging.subspace import WeightSubspace
from dgavg.averaging.subspace_sgd import SubspaceSGD


class Allocated(TorchDispatchMode):
    """Adds up the bytes of all tensors made in its block, without those freed again."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        given = [t for t in (*args, *(kwargs or {}).values()) if isinstance(t, torch.Tensor)]
        places = {t.untyped_storage().data_ptr() for t in given}
        if isinstance(found, torch.Tensor) and found.untyped_storage().data_ptr() not in places:
            self.bytes += found.untyped_storage().nbytes()
        return found


def vector(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def gram_schmidt(rows):
    """nblt/TWA's, as in their code: classical, one row after another."""
    rows = rows.clone()
    for i in range(len(rows)):
        if i > 0:
            shares = torch.mm(rows[:i], rows[i].reshape(-1, 1))
            rows[i] -= torch.mm(rows[:i].T, shares).reshape(-1)
        rows[i] /= rows[i].norm()
    return rows


class Work:
    """One model, its samples, and the ways to do the same thing."""

    def __init__(self, model, k):
        self.subspace = WeightSubspace(model, k=k)
        rows = []
        for _ in range(k):
            with torch.no_grad():
                for p in model.parameters():
                    p += 0.05 * p.std(correction=0) * torch.randn_like(p)
            self.subspace.update(model)
            rows.append(vector(p.detach() for p in model.parameters()))
        self.samples = torch.stack(rows)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        self.model = model
        self.gradient = vector(p.grad for p in model.parameters())
        self.rows = gram_schmidt(self.samples)
        self.sgd = SubspaceSGD(self.subspace, lr=1e-6, momentum=0.9, weight_decay=1e-5)
        self.plain = [torch.nn.Parameter(p.detach().clone()) for p in model.parameters()]
        for p, q in zip(self.plain, model.parameters(), strict=True):
            p.grad = q.grad.clone()
        self.optimizer = torch.optim.SGD(self.plain, lr=1e-6, momentum=0.9, weight_decay=1e-5)
        self.sgd.step(model)

    def basis(self):
        self.subspace._basis = None
        self.subspace.basis()

    def svd(self):
        torch.linalg.svd(self.samples - self.samples.mean(dim=0), full_matrices=False)

    def svd_transposed(self):
        torch.linalg.svd((self.samples - self.samples.mean(dim=0)).T, full_matrices=False)

    def gram_schmidt(self):
        gram_schmidt(self.samples)

    def step(self):
        self.sgd.step(self.model)
        self.subspace.copy_to(self.model)

    def projection(self):
        torch.mm(self.rows.T, torch.mm(self.rows, self.gradient.reshape(-1, 1)))

    def nblt_step(self):
        gradient = vector(p.grad for p in self.plain)
        found = torch.mm(self.rows.T, torch.mm(self.rows, gradient.reshape(-1, 1))).reshape(-1)
        parts = found.split([p.numel() for p in self.plain])
        for p, part in zip(self.plain, parts, strict=True):
            p.grad = part.reshape(p.shape)
        self.optimizer.step()


def medians(work, names, rounds):
    times = {name: [] for name in names}
    for round_ in range(rounds + 1):
        for name in sorted(names, key=lambda n: hash((n, round_))):
            start = time.process_time()
            getattr(work, name)()
            if round_:
                times[name].append(1000 * (time.process_time() - start))
    return {name: statistics.median(found) for name, found in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for model, k in ((resnet50(), 5), (resnet18(num_classes=10), 10)):
        work = Work(model, k)
        print(f"D = {len(work.gradient) / 1e6:.1f}M, K = {k}: ms, times ours, MiB allocated")
        for names, rounds in (
            (("basis", "svd", "svd_transposed", "gram_schmidt"), max(options.rounds // 4, 3)),
            (("step", "projection", "nblt_step"), options.rounds),
        ):
            found = medians(work, names, rounds)
            for name, value in found.items():
                with Allocated() as allocated:
                    getattr(work, name)()
                print(
                    f"  {name:15}{value:9.1f}{value / found[names[0]]:8.2f}"
                    f"{allocated.bytes / 2**20:10.1f}"
                )


if __name__ == "__main__":
    main()
