"""Records made by hand."""

from __future__ import annotations

PROTOCOL = {
    "name": "p",
    "steps": 20,
    "batch_size": 8,
    "holdout_fraction": 0.2,
    "test_split": "in",
    "selection": "validation",
    "splits": "domainbed",
}


def record(step, candidates, *, draw=None, seed=0, held_out="a", held_out_with=None, **extra):
    """`candidates`: by name the accuracies on the held-out domain and on validation data."""
    found = {}
    left_out = {held_out, held_out_with}
    for name, (test, validation) in candidates.items():
        splits = {
            f"{d}/in": {"accuracy": test, "loss": 1.0, "n": 10} for d in "abc" if d in left_out
        }
        splits |= {
            f"{d}/out": {"accuracy": validation, "loss": 1.0, "n": 10}
            for d in "abc"
            if d not in left_out
        }
        found[name] = {"batchnorm": "keep", "splits": splits}
    made = {
        "step": step,
        "held_out": held_out,
        "seed": seed,
        "chain": "ema_basic",
        "trainer": {"ema": {}, "basic": {}},
        "data": {"name": "toy", "content": "abc"},
        "optimizer": {"lr": 0.1 if draw is None else 0.1 * (draw + 1)},
        "protocol": dict(PROTOCOL),
        "candidates": found,
    }
    if held_out_with is not None:
        made["held_out_with"] = held_out_with
    if draw is not None:
        settings = ["optimizer.lr", "protocol.batch_size"]
        made["search"] = {"group": "g", "hparams_seed": draw, "settings": settings}
        made["protocol"]["batch_size"] = 8 + draw
    return made | extra
