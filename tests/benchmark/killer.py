"""Do what `dgavg ARGUMENTS` does, each time in a fork of this process, and kill some of them.

`python killer.py` reads a JSON list of [folder, arguments, moment] from standard input and prints
the list of how each ended: its exit status, or minus the signal that killed it. A fork spares each
run the seconds that Python takes to import torch. A moment is null or one of

- `["step", t]`: step t has changed the weights, and nothing has noticed yet;
- `["evaluation", n]`: one batch of the n-th evaluation has been scored;
- `["write", name, n]`: half of the bytes of the n-th file of that name are written;
- `["renamed", name, n]`: that file is just in its place.

The kill is `SIGKILL` to itself: nothing is cleaned up.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import traceback

import torch

from dgavg import cli, disk, run
from dgavg.benchmark import files
from dgavg.benchmark.experiment import build
from dgavg.config import compose, plain
from dgavg.evaluation import scoring


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_step(at: int) -> None:
    step = run.Run.step

    def patched(self, batch):
        loss = step(self, batch)
        if self.t == at:
            die()
        return loss

    run.Run.step = patched


def kill_in_evaluation(n: int) -> None:
    batches, calls = scoring.Scorer._batches, []

    def patched(self, *plans):
        calls.append(1)
        for i, batch in enumerate(batches(self, *plans)):
            if len(calls) == n and i == 1:
                die()
            yield batch

    scoring.Scorer._batches = patched


def kill_in_write(kind: str, name: str, n: int) -> None:
    write_atomically, calls = files.write_atomically, []

    def patched(path, write, *hint):
        calls.extend([1] if path.name == name else [])
        mine = path.name == name and len(calls) == n

        def half(file):
            whole = io.BytesIO()
            write(whole)
            file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
            file.flush()
            die()

        write_atomically(path, half if mine and kind == "write" else write)
        if mine:
            die()

    files.write_atomically = disk.write_atomically = patched


def child(folder: str, arguments: list[str], moment: list | None) -> int:
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the table
    if moment is not None:
        kind, *rest = moment
        if kind == "step":
            kill_in_step(*rest)
        elif kind == "evaluation":
            kill_in_evaluation(*rest)
        else:
            kill_in_write(kind, *rest)
    return cli.main(arguments)


def main() -> None:
    jobs, ends = json.load(sys.stdin), []
    build(plain(compose(jobs[0][1])))  # so that no fork has to import all it needs;
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # the first one imports torch's compiler
    for folder, arguments, moment in jobs:
        pid = os.fork()
        if pid == 0:
            try:
                os._exit(child(folder, arguments, moment))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        ends.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    print(json.dumps(ends))


if __name__ == "__main__":
    main()
