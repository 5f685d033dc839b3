"""How commands read their arguments, and what they say on standard error."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from dgavg.errors import UserError


class Parser(argparse.ArgumentParser):
    """Refuses what it can't read in one line that ends in `hint`; raises `UserError`."""

    def __init__(self, command: str, description: str | None, hint: str) -> None:
        super().__init__(f"dgavg {command}", description=description)
        self.hint = hint

    def error(self, message: str) -> NoReturn:
        """Refuse the arguments."""
        raise UserError(f"{message}; {self.hint}")


def say(text: str) -> None:
    """Print a line on standard error."""
    print(text, file=sys.stderr)


def tell(*texts: str) -> None:
    """Print lines on standard error that say who speaks."""
    for text in texts:
        say(f"dgavg: {text}")


def left_out(unfinished: int) -> list[str]:
    """What to say of runs that were passed over, if there are any."""
    return [f"left out {unfinished} run(s) that have not ended"] if unfinished else []
