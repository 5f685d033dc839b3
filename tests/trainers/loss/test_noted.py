"""What is noted in a step: the first of its losses, once."""

from __future__ import annotations

import torch

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
