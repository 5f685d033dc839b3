"""What is noted in a step: the first of its losses, once, and the mean over two processes.

The processes run this file; each writes what it took, and the q of GroupDRO that it ended with.
"""

from __future__ import annotations

import sys

import pytest
import torch
from ranks import join, started

from dgavg.testing import toy_run
from dgavg.trainers.loss import groupdro  # noqa: F401  (registers it)
from dgavg.trainers.loss.noted import Noted


class At:
    """A run as far as notes go."""

    def __init__(self, t):
        self.t = t


def test_the_first_of_a_step_is_kept_and_taken_once():
    noted = Noted()
    assert noted.take() is None
    noted.note(At(0), torch.tensor(1.0, requires_grad=True))
    noted.note(At(0), torch.tensor(2.0))
    found = noted.take()
    assert found == 1
    assert not found.requires_grad
    assert noted.take() is None
    noted.note(At(1), torch.tensor(3.0))
    assert noted.take() == 3


def test_a_restored_run_may_note_the_same_step_again():
    noted = Noted()
    noted.note(At(4), torch.tensor(1.0))
    noted.load_state_dict(noted.state_dict())
    assert noted.take() is None
    noted.note(At(4), torch.tensor(2.0))
    assert noted.take() == 2


class Shifted:
    """Toy batches of its own for each rank."""

    names, classes, epoch_length = ("a", "b", "c"), 3, 4

    def __init__(self, batches, rank):
        self.batches, self.rank = batches, rank

    def __call__(self, t):
        return self.batches(t + 100 * self.rank)


def main(rank, folder):
    join(rank, folder)
    noted, given = Noted(), torch.tensor([1.0 + rank, 5.0])
    noted.note(At(0), given)
    taken = noted.take()
    run = toy_run("groupdro_basic", {"groupdro": {"eta": 0.5}})
    run.batches = Shifted(run.batches, rank)
    risks = []
    for _ in range(3):
        risks.append(run.step(run.batches(run.t)).risks.detach())
        run.t += 1
        run.tap("after_step")
    found = {"taken": taken, "given": given, "risks": sum(risks), "log_q": run.trainer.log_q}
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return started(__file__, tmp_path_factory.mktemp("ranks"))


def test_two_processes_take_the_mean_and_keep_what_they_gave(ranks):
    for rank, found in enumerate(ranks):
        assert found["taken"].tolist() == [1.5, 5.0]
        assert found["given"].tolist() == [1.0 + rank, 5.0]


def test_two_processes_keep_one_q(ranks):
    first, second = ranks
    assert torch.equal(first["log_q"], second["log_q"])
    assert not torch.allclose(first["risks"], second["risks"])
    mean = (first["risks"] + second["risks"]) / 2
    torch.testing.assert_close(first["log_q"].exp(), torch.softmax(0.5 * mean, dim=0))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
