"""Training written the slow plain way, in float64, to hold the links against."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dgavg import Run, chain, fit
from dgavg.testing import ToyBatches, toy_model

STEPS = 12  # three epochs of the toy data


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def run_of(spec, settings=None, *, steps=STEPS, rows=8, domains=3, model=None, **options):
    """A run on the toy data by SGD with momentum, which does not blow up rounding as Adam does."""
    links, model = chain(spec, **(settings or {})), model or toy_model()
    options = {"optimizer": sgd, **options}
    return Run(links, model, ToyBatches(domains, rows), steps=steps, **options)


def trained(spec, settings=None, **options):
    run = run_of(spec, settings, **options)
    fit(run)
    return run


def domains_of(batch):
    """Index tensors of the rows of each domain, found by mask."""
    return [torch.nonzero(batch.d == i).flatten() for i in range(int(batch.d.max()) + 1)]


def forward(model, batch):
    features = model.featurizer(batch.x.double())
    return features, model.classifier(features)


def risks_of(logits, batch):
    """The mean cross-entropy of each domain's rows."""
    return [F.cross_entropy(logits[rows], batch.y[rows]) for rows in domains_of(batch)]


def mean(values):
    return sum(values) / len(values)


def erm(model, batch, t):
    """The mean of the domains' risks."""
    _, logits = forward(model, batch)
    return mean(risks_of(logits, batch))


def plain_training(loss=erm, *, steps=STEPS, rows=8, renew_at=None, after_step=None, gradient=None):
    """A float64 model trained by a loop; `renew_at` is the step before which SGD is made anew."""
    model, batches = toy_model().double(), ToyBatches(rows=rows)
    optimizer = sgd(model.parameters())
    for t in range(steps):
        if t == renew_at:
            optimizer = sgd(model.parameters())
        batch = batches(t)
        optimizer.zero_grad()
        if gradient is None:
            loss(model, batch, t).backward()
        else:
            gradient(model, batch, t)
        optimizer.step()
        if after_step is not None:
            after_step(model, t + 1)
    return model


def assert_weights(live, expected, rtol=1e-4, atol=2e-5):
    """The float32 tensors `live` are the float64 ones `expected`, integers exactly."""
    assert live.keys() == expected.keys()
    for name, tensor in live.items():
        wide = tensor.double() if tensor.is_floating_point() else tensor
        torch.testing.assert_close(
            wide, expected[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )


def iterates(run):
    """Train `run`; the state after each step t, in float64, by t."""
    found = {}

    def note(run):
        found[run.t] = {
            k: v.double() if v.is_floating_point() else v.clone() for k, v in run.live.items()
        }

    fit(run, after_step=note)
    return found


def mean_of(snapshots):
    """The mean of floating entries, integers of the last."""
    snapshots = list(snapshots)
    return {
        k: torch.stack([s[k] for s in snapshots]).mean(dim=0) if v.is_floating_point() else v
        for k, v in snapshots[-1].items()
    }
