"""Threads that decode, and the bar that shows how far they are."""

import sys
import time

import pytest

from dgavg.data import decode as decoding
from dgavg.errors import UserError


class Terminal:
    def __init__(self, tty):
        self.text, self.tty = "", tty

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return self.tty


@pytest.mark.parametrize(
    ("tty", "moment", "title", "expected"),
    [
        (True, 0.0, "decoding images", True),
        (True, 60.0, "decoding images", False),
        (False, 0.0, "decoding images", False),
        (True, 0.0, "", False),
    ],
)
def test_a_bar_on_a_terminal_after_a_moment(monkeypatch, tty, moment, title, expected):
    terminal = Terminal(tty)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(decoding, "MOMENT", moment)
    found = []
    for item in decoding.shown(range(5), 5, title):
        time.sleep(0.03)
        found.append(item)
    assert found == list(range(5))
    assert ("decoding images" in terminal.text) == expected
    if expected:
        assert "5/5" in terminal.text
    else:
        assert terminal.text == ""


def test_an_error_in_a_thread_arrives():
    def work(i):
        if i == 40:
            raise UserError("here")
        return i

    with pytest.raises(UserError, match="here"):
        list(decoding.threaded(work, range(100), 3))
    assert list(decoding.threaded(lambda i: i * i, range(100), 3)) == [i * i for i in range(100)]
