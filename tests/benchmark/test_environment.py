"""environment.json: what a run was trained on, and nothing of whose machine it was."""

from __future__ import annotations

import getpass
import json
import platform
import socket
from pathlib import Path

import torch

import dgavg
from dgavg.benchmark import environment
from dgavg.benchmark.environment import note_environment, read_environments


def test_a_run_notes_its_environment_beside_its_records(train, only_run, records_of):
    _, runs = train()
    run = only_run(runs)
    (found,) = read_environments(run)
    assert (found["torch"], found["python"]) == (torch.__version__, platform.python_version())
    assert (found["dgavg"], found["threads"], found["cuda"]) == (dgavg.__version__, 1, None)
    assert found["device"]
    assert all("environment" not in record for record in records_of(run))


def test_it_holds_no_name_of_a_machine_a_user_or_a_path(train, only_run):
    _, runs = train()
    text = (only_run(runs) / "environment.json").read_text()
    values = [str(v) for v in json.loads(text)[0].values()]
    assert str(Path.home()) not in text
    assert str(Path(dgavg.__file__).parent) not in text
    assert not {socket.gethostname(), getpass.getuser()} & set(values)


def test_the_commit_is_that_of_the_checkout():
    checkout = Path(dgavg.__file__).parent.parent
    found = environment.environment("cpu")["commit"]
    assert (found is not None) == (checkout / ".git").exists()
    assert found is None or len(found.removesuffix("-dirty")) == 40


def test_a_run_that_goes_on_elsewhere_has_two(tmp_path):
    note_environment(tmp_path, "cpu")
    note_environment(tmp_path, "cpu")
    assert len(read_environments(tmp_path)) == 1
    file = tmp_path / environment.FILE
    file.write_text(file.read_text().replace(torch.__version__, "1.0"))
    note_environment(tmp_path, "cpu")
    assert [e["torch"] for e in read_environments(tmp_path)] == ["1.0", torch.__version__]


def test_what_cannot_be_read_is_none(tmp_path):
    assert read_environments(tmp_path) == []
    for text in ("", "{}", "[1]", "\xff"):
        (tmp_path / environment.FILE).write_text(text, encoding="latin-1")
        assert read_environments(tmp_path) == []
