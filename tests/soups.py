"""The slow plain way to what soups and ensembles of runs must be, from the files of the runs."""

from __future__ import annotations

import json

import numpy as np
import torch
from safetensors.torch import load_file

from dgavg.data import make_splits
from dgavg.models import build_model


def members(home, held_out, seed, candidate="live", runs="runs"):
    """The weights of the runs in the order of their names."""
    folders = sorted(path for path in (home / runs).iterdir())
    name = f"{held_out}/{seed}/weights/{candidate}.safetensors"
    return [load_file(folder / name) for folder in folders]


def record_of(folder, held_out, seed):
    (line,) = (folder / f"{held_out}/{seed}/records.jsonl").read_text().splitlines()
    return json.loads(line)


def only(folder):
    (found,) = folder.iterdir()
    return found


def images_of(data, held_out, seed, part):
    """Images and labels: `test` the held-out in-part, `whole` all of it, `training` and
    `validation` the parts of the other domains, in the order of the data set."""
    splits, found = make_splits(data, 0.2, trial_seed=seed), []
    for i, domain in enumerate(data.domains):
        mine = domain.name == held_out
        keys = {
            "test": splits.in_[i] if mine else None,
            "whole": np.arange(len(domain)) if mine else None,
            "training": None if mine else splits.in_[i],
            "validation": None if mine else splits.out[i],
            "all training": None if mine else np.arange(len(domain)),
        }[part]
        if keys is not None:
            found.append((domain.images[keys].float() / 255, domain.labels[keys]))
    return found


def logits_of(weights, images):
    model = build_model("mlp", (1, 8, 8), 10, width=8).eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        return model(images)


def accuracy(weights, parts):
    """The mean over the parts."""
    found = [(logits_of(weights, x).argmax(1) == y).float().mean().item() for x, y in parts]
    return sum(found) / len(found)


def mean_of(states, shares=None):
    """In float64; integers of the last."""
    shares = shares or [1 / len(states)] * len(states)
    return {
        k: sum(a * s[k].double() for a, s in zip(shares, states, strict=True)).float()
        if v.is_floating_point()
        else states[-1][k]
        for k, v in states[0].items()
    }


def assert_close(found, expected, skip=()):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if not name.endswith(skip or ("nothing",)):
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def assert_first_statistics(weights, first):
    """Of the first batch norm, whose input is a linear layer; found by its name."""
    (mean_name, *_) = [k for k in weights if k.endswith("running_mean")]
    bias = weights["featurizer.1.bias"].double() if "featurizer.1.bias" in weights else 0
    torch.testing.assert_close(
        weights[mean_name].double(), first.mean(dim=0) + bias, rtol=1e-4, atol=1e-5
    )
    variance = weights[mean_name.replace("mean", "var")].double()
    torch.testing.assert_close(variance, first.var(dim=0), rtol=1e-4, atol=1e-6)


def names(home):
    return sorted(path.name for path in (home / "runs").iterdir())


def state(folder):
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def held_out_accuracy(record, candidate):
    return record["candidates"][candidate]["splits"][f"{record['held_out']}/in"]["accuracy"]
