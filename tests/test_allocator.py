"""What the allocator does with freed memory, seen by the page faults of a real process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import torch
from dgavg.allocator import keep_memory

done = keep_memory() if sys.argv[1] == "keep" else None

def step():
    parts = [torch.ones(10_000_000) for _ in range(3)]  # each larger than malloc ever keeps
    return sum(float(part[0]) for part in parts)

for _ in range(3):  # until its memory has found its place
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(done, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's mallopt")


def faults(how, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, how],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    done, number = found.stdout.split()
    return done, int(number)


def test_memory_once_had_is_not_asked_for_again():
    _, before = faults("leave")
    done, after = faults("keep")
    assert done == "True"
    assert before > 500  # 10 steps of 120 MB in pages of 4 KiB, or of 2 MiB at most
    assert after < before / 20


def test_what_the_environment_says_is_left_alone():
    done, number = faults("keep", MALLOC_ARENA_MAX="4")
    assert done == "False"
    assert number > 500
