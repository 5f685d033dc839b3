"""Every link on two gloo processes against one process that has the rows of both.

The processes run this file; each writes what its runs ended with, by link and model.
"""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from links import ACTING, SHADOWS
from ranks import Half, join, smooth_model, started
from torch import nn

from dgavg import Run, chain, fit
from dgavg.averaging.batchnorm import batchnorm_layers
from dgavg.testing import ToyBatches, toy_model
from dgavg.trainers.batch import mixstyle

OTHER_DRAWS = {  # what differs from one process by its nature
    "mixstyle": "partners are rows of the same process",
    "cutmix": "within a domain, partners are rows of the same process",
    "mixup": "within a domain, partners are rows of the same process",
}
WITHIN = {"cutmix": {"alpha": 1.0, "across": False}, "mixup": {"alpha": 1.0, "across": False}}
PAIRS = [  # links that meet in one another's graph
    "iga_rsc_basic",
    "fishr_rsc_basic",
    "iga_mtl_basic",
    "dann_arm_basic",
    "andmask_irm_basic",
    "mldg_sd_basic",
    "groupdro_sam_irm_basic",
    "ema_swad_fish_sam_basic",
    "sam_dann_iga_basic",
]
# All shadows in one chain.
RUNS = ["_".join([*SHADOWS, "basic"]), *(k for k in ACTING if k not in SHADOWS), *PAIRS]
NOISY = {"dial": ACTING["dial"] | {"noise": 0.3}}  # else too small to see whose it is
# Those whose passes or steps treat running statistics in a way of their own.
BATCH_NORM = ["basic", "ma", "twa", "sam", "mldg", "fish", "rsc", "dial", "lpft", "mtl", "arm"]


def spec_of(link):
    return link if link.endswith("basic") else f"{link}_basic"


def evaluate(run):
    """Accuracy and loss of every candidate on one batch, the same in every process."""
    batch, found = ToyBatches()(10_000), {}
    for name, candidate in run.candidates().items():
        twin = copy.deepcopy(run.model)
        twin.load_state_dict(candidate.weights)
        with torch.no_grad():
            logits = twin.eval()(batch.x)
        right = (logits.argmax(dim=1) == batch.y).float().mean().item()
        found[name] = {
            "accuracy": right,
            "loss": nn.functional.cross_entropy(logits, batch.y).item(),
        }
    return found


def trained(spec, batches, *, smooth=True, settings=None):
    """Weights, candidates, state of the links and logged losses of a run to its end."""
    torch.manual_seed(0)  # arm draws its own weights
    names = spec.split("_")
    links = chain(
        spec, **{k: v for k, v in (ACTING | NOISY | (settings or {})).items() if k in names}
    )
    run = Run(
        links,
        smooth_model() if smooth else toy_model(),
        batches,
        steps=12,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.5),
        evaluate=evaluate,
        eval_every=3,
        clip=1.0,
    )
    for layer in batchnorm_layers(run.model) if smooth else ():
        layer.eval()  # arm's own: statistics of a batch are those of a process's rows
    log = []
    fit(run, after_step=lambda run: log.append(run.losses._rows[-1][1].clone()))
    found = {f"losses/{i}": row for i, row in enumerate(log)}
    found |= {f"model/{k}": v for k, v in run.live.items()}
    found |= {f"extras/{k}": v for k, v in run.extras.state_dict().items()}
    for name, candidate in run.candidates().items():
        found |= {f"{name}/{k}": v for k, v in candidate.weights.items()}
    return {k: v.detach().clone() for k, v in found.items()}


def main(rank, folder):
    join(rank, folder)
    found, shares, restyled = {}, [], mixstyle.restyled
    mixstyle.restyled = lambda x, partner, share: (
        shares.append(share.detach().clone()) or restyled(x, partner, share)
    )
    for link in RUNS:
        found[link] = trained(spec_of(link), Half(rank))
    for link in BATCH_NORM:
        found[f"{link} with batch norm"] = trained(spec_of(link), Half(rank), smooth=False)
    for link in WITHIN:
        found[f"{link} within"] = trained(spec_of(link), Half(rank), settings=WITHIN)
    found["shares of mixstyle"] = torch.stack(shares)
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return started(__file__, tmp_path_factory.mktemp("ranks"))


EVERY = [
    *RUNS,
    *(f"{link} with batch norm" for link in BATCH_NORM),
    *(f"{link} within" for link in WITHIN),
]


@pytest.mark.parametrize("name", EVERY)
def test_processes_are_equal_to_the_bit_and_finite(ranks, name):
    one, other = (rank[name] for rank in ranks)
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert value.isfinite().all(), key
        assert value.equal(other[key]), key


@pytest.mark.parametrize("link", [k for k in RUNS if k != "mixstyle"])
def test_two_processes_train_as_one(ranks, link):
    expected, start = trained(spec_of(link), ToyBatches()), smooth_model().state_dict()
    found = ranks[0][link]
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)
    if {f"model/{k}" for k in start} <= found.keys():
        assert any(not v.equal(found[f"model/{k}"]) for k, v in start.items())


@pytest.mark.parametrize("name", ["mixstyle", *(f"{link} within" for link in WITHIN)])
def test_draws_of_rows_are_of_each_process(ranks, name):
    link = name.partition(" ")[0]
    assert link in OTHER_DRAWS
    expected = trained(spec_of(link), ToyBatches(), settings=WITHIN)
    far = [(v - expected[k]).abs().max() for k, v in ranks[0][name].items() if "model" in k]
    assert 1e-4 < max(far) < 0.5


def test_styles_are_mixed_in_other_shares_in_each_process(ranks):
    one, other = (rank["shares of mixstyle"] for rank in ranks)
    assert one.shape == other.shape
    assert not torch.isclose(one, other).any(dim=1).all()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
