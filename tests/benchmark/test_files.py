"""Files are whole or as before; what is not ours is refused in one line."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
import zlib

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch.serialization import get_crc32_options, set_crc32_options

from dgavg import UserError
from dgavg.benchmark.files import (
    differences,
    load_checkpoint,
    read_records,
    record_line,
    save_checkpoint,
    save_weights,
)
from dgavg.disk import write_atomically, write_text


def test_an_exception_in_a_write_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")

    def fail(file):
        file.write(b"ne")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    saved = {"t": 3, "x": torch.arange(4.0), "list": [1, "a", None], "inner": {"y": 0.5}}
    save_checkpoint(tmp_path / "c.pt", saved)
    found = load_checkpoint(tmp_path / "c.pt")
    assert torch.equal(found.pop("x"), saved.pop("x"))
    assert found == {"format": "dgavg checkpoint 1", **saved}


@pytest.mark.parametrize("before", [True, False])
def test_no_checksums_are_reckoned_and_the_setting_is_the_users(before, tmp_path):
    given = get_crc32_options()
    try:
        set_crc32_options(before)
        save_checkpoint(tmp_path / "c.pt", {"x": torch.ones(1000)})
        assert get_crc32_options() == before
        with pytest.raises(UserError, match="cannot be written"):
            save_checkpoint(tmp_path / "none" / "c.pt", {"x": torch.ones(1000)})
        assert get_crc32_options() == before
        torch.save({"x": torch.ones(1000)}, tmp_path / "theirs.pt")
    finally:
        set_crc32_options(given)
    assert not _has_true_checksums(tmp_path / "c.pt")
    assert _has_true_checksums(tmp_path / "theirs.pt") == before


def _has_true_checksums(path):
    with zipfile.ZipFile(path) as archive:
        (data,) = (i for i in archive.infolist() if i.filename.endswith("/data/0"))
    return zlib.crc32(torch.ones(1000).numpy().tobytes()) == data.CRC


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "foreign", "code", "plain pickle"])
def test_a_checkpoint_that_is_not_whole_and_ours_is_refused(kind, tmp_path):
    path, trap = tmp_path / "c.pt", tmp_path / "trap"
    save_checkpoint(path, {"x": torch.zeros(1000)})
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "code":
        torch.save({"format": "dgavg checkpoint 1", "x": Evil(trap)}, path)
    elif kind == "foreign":
        torch.save({"model": torch.zeros(3)}, path)
    else:
        content = {"empty": b"", "text": b"no checkpoint", "plain pickle": pickle.dumps(Evil(trap))}
        path.write_bytes(content[kind])
    with pytest.raises(UserError) as caught:
        load_checkpoint(path)
    assert str(caught.value) == (
        f"{path} is truncated or not a checkpoint of dgavg; delete it to start this run anew"
    )
    assert not trap.exists()


def test_a_full_disk_is_one_line_and_leaves_the_old_checkpoint(tmp_path):
    """A limit on the size of files stands in for the disk: the system refuses the same way."""
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"t": 1})
    code = (
        "import resource, sys, torch; from pathlib import Path\n"
        "from dgavg import UserError; from dgavg.benchmark.files import save_checkpoint\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "try: save_checkpoint(Path(sys.argv[1]), {'x': torch.zeros(100000)})\n"
        "except UserError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
    )
    assert done.stdout == f"{path} cannot be written: File too large; choose another runs=FOLDER\n"
    assert load_checkpoint(path)["t"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_equal_weights_are_equal_files_that_say_what_they_are(tmp_path):
    notes = {"chain": "ema_basic", "candidate": "ema", "step": "3", "more": "x", "and": "y"}
    shared = torch.arange(3.0)
    contents = set()
    for i in range(8):
        save_weights(tmp_path / f"{i}", {"a": shared, "tied": shared, "n": torch.tensor(2)}, notes)
        contents.add((tmp_path / f"{i}").read_bytes())
    assert len(contents) == 1
    with safe_open(tmp_path / "0", "pt") as file:
        assert json.loads(file.metadata()["dgavg"]) == notes
        assert torch.equal(file.get_tensor("tied"), shared)


DTYPES = (
    *(torch.int64, torch.float64, torch.float32, torch.int32, torch.bfloat16),
    *(torch.float16, torch.int16, torch.int8, torch.uint8, torch.bool),
)


def _weights_of_every_kind(**more):
    """Names that sort in another way than they stand here, and tensors without plain memory."""
    names = [*DTYPES, torch.float32, torch.bool]
    random = torch.Generator().manual_seed(0)
    found = {
        f"layer.{i % 4}.{i}é\n\x01": torch.randint(0, 2, (3, i, 2), generator=random).to(dtype)
        for i, dtype in enumerate(names)
    }
    found["scalar"] = torch.tensor(3.5)
    found["gaps"] = torch.rand(6, 4, generator=random)[:, ::2]
    found["axes"] = torch.rand(2, 3, 4, 5, generator=random).to(memory_format=torch.channels_last)
    found["trained"] = torch.rand(5, generator=random).requires_grad_()
    return found | more


@pytest.mark.parametrize("exotic", [False, True])
def test_weights_are_written_as_safetensors_itself_would(exotic, tmp_path):
    narrow = torch.ones(3).to(torch.float8_e5m2)
    more = {"8 bits": narrow, "tied": narrow} if exotic else {}
    weights, notes = _weights_of_every_kind(**more), {"chain": "ema_basic", "é": '"\\'}
    save_weights(tmp_path / "w", weights, notes)
    plain = {k: v.detach().clone().contiguous() for k, v in weights.items()}
    expected = safetensors.torch.save(plain, metadata={"dgavg": json.dumps(notes)})
    assert (tmp_path / "w").read_bytes() == expected
    found = safetensors.torch.load_file(tmp_path / "w")
    assert found.keys() == weights.keys()
    assert all(
        v.dtype == weights[k].dtype and v.shape == weights[k].shape for k, v in found.items()
    )
    assert all(v.float().equal(weights[k].detach().float()) for k, v in found.items())
    assert os.listdir(tmp_path) == ["w"]


def test_a_record_is_one_line_of_plain_json():
    line = record_line({"loss": float("nan"), "x": [float("inf"), 1.5], "name": "é\n"})
    assert line == '{"loss": null, "x": [null, 1.5], "name": "é\\n"}\n'


@pytest.mark.parametrize("text", [None, "", '{"step": 1', "[1]", '{"step": 1}', "\xff"])
def test_damaged_records_are_refused(text, tmp_path):
    path = tmp_path / "run" / "records.jsonl"
    path.parent.mkdir()
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError) as caught:
        read_records(path)
    assert str(caught.value) == (
        f"{path} is missing or damaged; delete {path.parent} to train that run anew"
    )


def test_differences_name_the_settings_and_their_order():
    mine = {"a": {"x": 1, "y": 2}, "b": [1]}
    assert list(differences(mine, {"a": {"x": 1, "y": 3}, "b": [1]})) == ["a.y=3 there, 2 here"]
    assert list(differences(mine, {"a": {"y": 2, "x": 1}, "b": [1]})) == ["a: another order"]
    assert list(differences(mine, mine)) == []
