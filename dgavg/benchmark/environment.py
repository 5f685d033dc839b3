"""Where a run was trained: versions and hardware, nothing that tells a person or a machine."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

import dgavg
from dgavg.disk import write_text

FILE = "environment.json"


def environment(device: torch.device | str) -> dict[str, Any]:
    """Versions, hardware and threads of this process, as JSON takes them; unknown is null."""
    device = torch.device(device)
    cuda = device.type == "cuda"
    return {
        "dgavg": dgavg.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "threads": torch.get_num_threads(),
    }


def note_environment(folder: Path, device: torch.device | str) -> None:
    """Add this environment to those that a run's folder names, unless it is the last of them.

    A run that goes on elsewhere has two.
    """
    found, now = read_environments(folder), environment(device)
    if found[-1:] != [now]:
        write_text(folder / FILE, json.dumps([*found, now], indent=1) + "\n")


def read_environments(folder: Path) -> list[dict[str, Any]]:
    """The environments of a run in their order; none for one that noted none, or not readably."""
    found: Any = None
    with suppress(OSError, ValueError):
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
    whole = isinstance(found, list) and all(isinstance(one, dict) for one in found)
    return found if whole else []


@cache
def _commit() -> str | None:
    """The commit of the checkout that the package is in, and whether it was changed since."""
    root = Path(dgavg.__file__).parent.parent
    if not ((root / ".git").exists() and (root / "pyproject.toml").exists()):
        return None  # installed, maybe below the checkout of something else
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            [*command, "--dirty"], capture_output=True, text=True, check=True, timeout=10
        )
        return done.stdout.strip() or None
    return None


@cache
def _processor() -> str:
    """The name of the processor, or its architecture where the system doesn't tell."""
    with suppress(OSError):
        named = re.search(r"(?m)^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text())
        if named:
            return named[1].strip()
    return platform.processor() or platform.machine()
