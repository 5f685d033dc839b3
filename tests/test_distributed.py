"""What two real processes share: rows, scores, statistics, words, and one table.

The processes run this file, with the environment that torchrun would give them.
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from ranks import started
from torch import nn

from dgavg import UserError, distributed, leave_one_domain_out
from dgavg.averaging.moments import ranks as count
from dgavg.benchmark.checks import find_device
from dgavg.data import Domain, DomainDataset, TrainingBatches, make_splits
from dgavg.evaluation import Scorer
from dgavg.evaluation.scoring import Split
from dgavg.gather import average_statistics, gather, mean, own_rows, same_on_all
from dgavg.models import Model
from dgavg.seeding import random_states, seed_everything, seed_own, set_random_states
from dgavg.testing import toy_model
from dgavg.trainer import Candidate

SETTINGS = {"model.width": 8, "protocol.steps": 6, "protocol.eval_every": 3}


def small_data():
    random = torch.Generator().manual_seed(0)
    domains = []
    for i, n in enumerate((50, 60, 70)):
        images = torch.randint(0, 256, (n, 1, 4, 4), generator=random, dtype=torch.uint8)
        domains.append(Domain(f"d{i}", images, torch.arange(n) % 3))
    return DomainDataset("small", tuple(domains), ("a", "b", "c"))


def batches_of(batch_size=8, **options):
    data = small_data()
    splits = make_splits(data, holdout_fraction=0.2, trial_seed=0)
    settings = {"batch_size": batch_size, "seed": 1, "device": "cpu", **options}
    return TrainingBatches(data, splits, [0, 1], **settings)


def rows_and_scores(support=None):
    """A batch, the images that recalibrate, and what they and other ones make of candidates."""
    batches = batches_of()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU()]
        model = Model(nn.Sequential(*layers), nn.Linear(8, 3)).train()
    if support is not None:
        model.support = support
    splits = {
        name: Split(domain.images, domain.labels)
        for name, domain in zip(("a/out", "b/out", "c/in"), small_data().domains, strict=True)
    }
    held_out = frozenset({"c/in"})
    scorer = Scorer(model, splits, lambda: batches.pooled(16), batch_size=32, held_out=held_out)
    live = model.state_dict()
    other = {k: v * 1.5 if v.is_floating_point() else v for k, v in live.items()}
    scores = scorer.score(
        {
            "live": Candidate(live),
            "mean": Candidate(other, "recalibrate"),
            "probe": Candidate(other, "average", probe=True),
        }
    )
    plain = {n: {s: (v.accuracy, v.loss) for s, v in found.items()} for n, found in scores.items()}
    pooled = list(batches.pooled(16))
    batch = batches(70)
    crops = batches_of(augment="domainbed")
    crops(3)
    return {
        "crops": crops._augment_rng.initial_seed(),
        "x": batch.x,
        "y": batch.y,
        "d": batch.d,
        "pooled": torch.cat(pooled),
        "scores": plain,
        "statistics": scorer.weights("mean")["featurizer.2.running_var"].clone(),
    }


def refused(work):
    """The one line of the mistake that `work` makes."""
    try:
        work()
    except UserError as error:
        return str(error)
    return ""


def words(rank):
    """What the first does for all, and the mistakes that it makes for all."""

    def wrong():
        raise UserError(f"rank {rank} sees it")

    return {
        "said": distributed.on_first(lambda: f"by {rank}"),
        "mistake": refused(lambda: distributed.on_first(wrong)),
        "alone": distributed.first_alone(lambda: f"by {rank}"),
        "odd": refused(lambda: batches_of(batch_size=7)),
        "one device": refused(lambda: find_device("cuda:0")),
        "no device": refused(lambda: find_device("cuda")),
        "auto": str(find_device("auto" if not torch.cuda.is_available() else "cpu")),
    }


def draws(rank):
    """Numbers from the global generators: of the start, of one's own, and those restored."""
    seed_everything(5)
    start = torch.rand(3)
    seed_own(5)
    saved = random_states()
    own = torch.rand(3)
    set_random_states(saved)
    other = refused(lambda: set_random_states(saved[0]))
    return {"start": start, "own": own, "again": torch.rand(3), "other": other}


def modules(rank):
    """Weights made equal; statistics of different and of equal rows averaged."""
    model = toy_model(seed=rank)
    model.register_buffer("flags", torch.tensor([True, bool(rank)]))
    model.to(memory_format=torch.preserve_format)
    same_on_all(model)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    layer = model.featurizer[2]
    layer.running_mean.fill_(0.1 + rank)
    layer.running_var.fill_(0.3)
    average_statistics(model)
    return {"start": start, "mean": layer.running_mean, "var": layer.running_var}


def slopes(rank):
    """First and second slopes of a function of all rows: x₁² · x₂, from a row on each process."""
    own = torch.tensor([2.0 + rank], requires_grad=True)
    both = gather(own, 1)
    first = torch.autograd.grad(both[0] ** 2 * both[1], own, create_graph=True)[0]
    shared = gather(first, 1) / 2  # each holds twice its part: (12, 4)
    second = torch.autograd.grad(shared.square().sum(), own)[0]
    third = torch.tensor([1.0 + rank], requires_grad=True)
    (of_mean,) = torch.autograd.grad((mean(third) * (1 + rank)).sum(), third)
    rows = own_rows(torch.arange(8), 2)
    return {"first": first, "second": second, "mean": of_mean, "rows": rows}


def told(rank):
    """What each process prints of a mistake that all make, and of one that the second makes."""
    found = []
    for lonely in (True, False):
        distributed.MANNERS = timedelta(seconds=0.2 if lonely else 60)
        time.sleep(0 if lonely or rank else 1)  # the second speaks before the first does
        out = io.StringIO()
        with contextlib.redirect_stderr(out):
            if rank or not lonely:
                distributed.tell(f"rank {rank}")
        found.append(out.getvalue())
    return found


def main(rank, folder):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": (folder / "port").read_text()}
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    torch.set_num_threads(1)
    with distributed.together():
        found = {"parts": rows_and_scores(), "support": rows_and_scores(support=5)}
        found |= {"words": words(rank), "draws": draws(rank), "modules": modules(rank)}
        found["slopes"] = slopes(rank)
    assert not torch.distributed.is_initialized()
    tables = []
    for name in ("x", "y"):  # they meet again, and again
        table = leave_one_domain_out(
            "ema_basic",
            small_data(),
            settings=SETTINGS,
            seeds=[0],
            holdout=["d1"],
            runs=folder / f"runs of {0 if name == 'x' else rank}",
            name=name,
        )
        tables.append(str(table))
    found["tables"] = tables
    found["told"] = told(rank)
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        (folder / "port").write_text(str(free.getsockname()[1]))
    return started(__file__, folder)


def test_each_process_has_its_rows_of_every_domain_in_order(ranks):
    whole = rows_and_scores()
    for key in ("x", "y", "d"):
        parts = [rank["parts"][key].unflatten(0, (2, 4)) for rank in ranks]
        assert torch.cat(parts, dim=1).flatten(0, 1).equal(whole[key]), key


def test_crops_are_of_each_process(ranks):
    seeds = [rank["parts"]["crops"] for rank in ranks]
    assert seeds[0] == rows_and_scores()["crops"] != seeds[1]


def test_the_images_that_recalibrate_are_dealt_out(ranks):
    parts = torch.cat([rank["parts"]["pooled"] for rank in ranks]).flatten(1)
    whole = rows_and_scores()["pooled"].flatten(1)
    assert sorted(parts.tolist()) == sorted(whole.tolist())


@pytest.mark.parametrize(("part", "support"), [("parts", None), ("support", 5)])
def test_scores_are_those_of_one_process_and_the_same_everywhere(ranks, part, support):
    one, other = (rank[part] for rank in ranks)
    assert one["scores"] == other["scores"]
    assert one["statistics"].equal(other["statistics"])
    whole = rows_and_scores(support)
    torch.testing.assert_close(one["statistics"], whole["statistics"])
    assert one["scores"].keys() == whole["scores"].keys()
    for name, found in whole["scores"].items():
        assert one["scores"][name].keys() == found.keys()
        for split, score in found.items():
            assert one["scores"][name][split] == pytest.approx(score, rel=1e-5)
    assert "c/in" not in one["scores"]["probe"]


def test_the_first_speaks_for_all(ranks):
    for rank in ranks:
        assert rank["words"]["said"] == "by 0"
        assert rank["words"]["mistake"] == "rank 0 sees it"
    assert [rank["words"]["alone"] for rank in ranks] == ["by 0", "by 1"]


def test_what_processes_cannot_share_is_refused(ranks):
    for rank in ranks:
        assert rank["words"]["odd"] == (
            "protocol.batch_size=7 images a domain can't be shared evenly by 2 processes; write "
            "protocol.batch_size=8"
        )
        assert rank["words"]["one device"] == (
            "device=cuda:0 is one device for 2 processes; write device=cuda or device=cpu"
        )
        assert rank["words"]["auto"] == "cpu"


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="there are GPUs for two processes")
def test_two_processes_need_two_gpus(ranks):
    gpus = torch.cuda.device_count()
    assert ranks[0]["words"]["no device"] == ranks[1]["words"]["no device"]
    assert ranks[0]["words"]["no device"].startswith(f"2 processes on a machine with {gpus} GPU")


def test_draws_are_the_same_first_and_then_ones_own(ranks):
    one, other = (rank["draws"] for rank in ranks)
    assert one["start"].equal(other["start"])
    assert not one["own"].equal(other["own"])
    for found in (one, other):
        assert found["again"].equal(found["own"])
        assert found["other"] == (
            "the checkpoint is of a run on 1 process, here 2: go on with one process, no torchrun"
        )


def test_all_start_from_the_firsts_weights(ranks):
    for rank in ranks:
        start = rank["modules"]["start"]
        assert all(v.equal(start[k]) for k, v in toy_model(seed=0).state_dict().items())
        assert start["flags"].tolist() == [True, False]


def test_statistics_are_averaged_and_equal_ones_stay(ranks):
    for rank in ranks:
        torch.testing.assert_close(rank["modules"]["mean"], torch.full((8,), 0.6))
        assert rank["modules"]["var"].equal(torch.full((8,), 0.3))


def test_slopes_of_gathered_rows_are_exact_to_the_second_order(ranks):
    # f = x² y at (2, 3): slopes (12, 4); of |slopes|² = 4x²y² + x⁴ they are (176, 96)
    assert [rank["slopes"]["first"].item() for rank in ranks] == [24, 8]
    assert [rank["slopes"]["second"].item() for rank in ranks] == [2 * 176, 2 * 96]
    assert [rank["slopes"]["mean"].item() for rank in ranks] == [1.5, 1.5]
    assert [rank["slopes"]["rows"].tolist() for rank in ranks] == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_every_process_gets_the_table_and_the_first_alone_writes(ranks, folder):
    assert ranks[0]["tables"] == ranks[1]["tables"]
    assert (folder / "runs of 0/x/d1/0/done").exists()
    assert (folder / "runs of 0/y/d1/0/done").exists()
    assert not (folder / "runs of 1").exists()


def test_a_mistake_is_told_once_and_by_the_second_where_the_first_is_silent(ranks):
    assert [rank["told"] for rank in ranks] == [["", "rank 0\n"], ["rank 1\n", ""]]


def test_one_process_alone_has_all_rows():
    rows = torch.arange(3.0, requires_grad=True)
    assert gather(rows, 1) is own_rows(rows, 1) is mean(rows) is rows
    assert count() == 1
    with distributed.together():
        assert not torch.distributed.is_initialized()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
