"""Training on two gloo processes against one that sees the rows of both.

The processes run this file; each writes its weights, by case.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from ranks import Half, join, smooth_model, started
from torch import nn

from dgavg import Run, Trainer, UserError, chain, fit, trainer
from dgavg.testing import ToyBatches, toy_model

SETTINGS = {"sam": {"rho": 0.3}, "gsam": {"rho": 0.3}, "mldg": {"n_meta_test": 1}}
PLAIN = ["basic", "sam_basic", "gsam_basic", "mldg_basic", "andmask_basic", "pcgrad_basic"]
CASES = [  # chain, model, precision
    *((spec, "smooth", "fp32") for spec in [*PLAIN, "fish_basic", "pcgrad_sam_basic"]),
    *((spec, "toy", "fp32") for spec in [*PLAIN, "fish_basic", "iga_basic"]),
    ("blast_basic", "smooth", "fp16"),
]


@trainer("blast")
class Blast(Trainer):
    """At step 2 the first process alone adds what overflows float16 once it is scaled."""

    def loss(self, run, batch):
        out = self.inner.loss(run, batch)
        first = torch.distributed.is_initialized() and torch.distributed.get_rank() == 0
        out.terms["blast"] = (10.0 if run.t == 2 and first else 0.0) * out.logits.sum()
        return out


def trained(case, batches):
    spec, model, precision = case
    links = chain(spec, **{k: v for k, v in SETTINGS.items() if k in spec.split("_")})
    run = Run(
        links,
        toy_model() if model == "toy" else smooth_model(),
        batches,
        steps=12,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        precision=precision,
        clip=2.0,
    )
    fit(run)
    return dict(run.model.named_parameters()), run.update.state_dict()


def wrapped():
    """What a run says to a model in `DistributedDataParallel`."""
    model = nn.parallel.DistributedDataParallel(smooth_model())
    try:
        Run("basic", model, ToyBatches(), steps=1)
    except UserError as error:
        return str(error)
    return None


def main(rank, folder):
    join(rank, folder)
    found = {"_".join(case): trained(case, Half(rank)) for case in CASES}
    found["wrapped"] = wrapped()
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return started(__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES, ids="_".join)
def test_processes_stay_equal_to_the_bit(ranks, case):
    (one, scale), (other, other_scale) = (rank["_".join(case)] for rank in ranks)
    assert all(v.equal(other[k]) for k, v in one.items())
    assert all(v.isfinite().all() for v in one.values())
    assert scale == other_scale


@pytest.mark.parametrize("case", [c for c in CASES if c[1:] == ("smooth", "fp32")], ids="_".join)
def test_without_batch_norm_two_processes_train_as_one(ranks, case):
    expected, _ = trained(case, ToyBatches())
    start = dict(smooth_model().named_parameters())
    for name, value in ranks[0]["_".join(case)][0].items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
        assert (value - start[name]).abs().max() > 0.01


def test_an_overflow_in_one_process_is_skipped_by_all(ranks):
    _, state = ranks[1]["blast_basic_smooth_fp16"]
    assert state == {"scale": 2.0**15, "good": 9}


def test_a_wrapped_model_is_refused(ranks):
    assert "DistributedDataParallel has no featurizer" in ranks[0]["wrapped"]


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
