"""What commands say on standard error."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """Print a line on standard error."""
    print(text, file=sys.stderr)


def left_out(unfinished: int) -> None:
    """Say how many runs were passed over, if any."""
    if unfinished:
        say(f"dgavg: left out {unfinished} run(s) that have not ended")
