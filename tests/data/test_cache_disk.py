"""The cache of decoded images among processes, and on disks that are full."""

import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from dgavg.data import cache, load

TREE = {"photo": {"cat": ["1.png", "2.jpg", "3.png"], "dog": ["a.bmp", "b.png"]}}
TREE["sketch"] = {"cat": ["x.png"], "dog": ["y.jpeg", "z.png"]}


@pytest.fixture
def root(write_tree):
    return write_tree(TREE)


def read(root, **settings):
    return load("folder", root=str(root), **{"size": 7, **settings})


def same(a, b):
    pairs = zip(a.domains, b.domains, strict=True)
    return all(torch.equal(x.images, y.images) for x, y in pairs)


def files(root, kind="*.images"):
    return sorted((root / cache.FOLDER).glob(kind))


def run(code, root, *arguments):
    """A process of its own that runs the code with `root` and the names of this module."""
    head = f"""
        import os, sys, time
        from pathlib import Path
        from dgavg.data import cache, load
        from dgavg.data import decode as decoding
        from dgavg.errors import UserError
        root = Path({str(root)!r})
    """
    script = textwrap.dedent(head) + textwrap.dedent(code)
    command = [sys.executable, "-W", "error", "-c", script]
    return subprocess.Popen(
        [*arguments, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_killed_builder_leaves_nothing_that_is_trusted(root):
    code = """
        decode, seen = decoding.decode, []
        def slow(path, out):
            seen.append(path)
            if len(seen) > 4:
                print("now", flush=True)
                time.sleep(60)
            return decode(path, out)
        decoding.decode = slow
        load("folder", root=str(root), size=7, workers=1)
    """
    process = run(code, root)
    assert process.stdout.readline() == "now\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(files(root, "*.part")) == 1
    assert not files(root)
    (root / cache.FOLDER / "of another size.part").write_bytes(b"left by another killed builder")
    assert same(read(root), read(root, cache="none"))
    assert not files(root, "*.part")


def test_one_builds_while_others_wait(root):
    code = """
        decode = decoding.decode
        def slow(path, out):
            print(path.name, flush=True)
            time.sleep(0.3)
            return decode(path, out)
        decoding.decode = slow
        data = load("folder", root=str(root), size=7, workers=1)
        print(data.fingerprint())
    """
    processes = [run(code, root) for _ in range(2)]
    results = [p.communicate() for p in processes]
    assert [p.returncode for p in processes] == [0] * 2
    lines = [out.split("\n")[:-1] for out, _ in results]
    assert sorted(map(len, lines)) == [1, 9]
    assert {found[-1] for found in lines} == {read(root, cache="none").fingerprint()}
    waited = [err for (_, err), found in zip(results, lines, strict=True) if len(found) == 1]
    assert all(f"decodes images into {root / cache.FOLDER}: waiting" in err for err in waited)


REFUSED = """
    try:
        load("folder", root=str(root), size=64, cache=CACHE)
    except UserError as error:
        print(error)
"""


def test_a_file_that_may_not_grow(root, tmp_path):
    """With the space reserved first, and where the file system can't do that."""
    place = tmp_path / "small"
    limit = """
        import errno, resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    """
    unable = """
        def refuse(*arguments):
            raise OSError(errno.EOPNOTSUPP, "no such thing")
        os.posix_fallocate = refuse
    """
    refused = REFUSED.replace("CACHE", repr(str(place)))
    code = "".join(map(textwrap.dedent, (limit, refused, unable, refused)))
    out, err = run(code, root).communicate()
    assert err == ""
    expected = (
        f"decoded images cannot be written to {place} (File too large; they need 0.00 GiB): set "
        "data.cache=FOLDER to one with room, data.cache=none to hold them in memory, or a smaller "
        "data.size"
    )
    assert out.splitlines() == [expected] * 2
    assert [path.name for path in place.iterdir()] == [".lock"]


def test_a_full_disk(root, tmp_path):
    """A real one: a file system of 64 KiB, in a name space where anybody may mount."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-Urm", "true"]).returncode:
        pytest.skip("needs `unshare -Urm`: mounting as an ordinary user")
    place = tmp_path / "disk"
    place.mkdir()
    code = f"""
        import subprocess
        command = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", {str(place)!r}]
        subprocess.run(command, check=True)
    """
    after = f"\nprint(sorted(os.listdir({str(place)!r})))\n"
    code = textwrap.dedent(code) + textwrap.dedent(REFUSED.replace("CACHE", repr(str(place))))
    out, err = run(code + after, root, "unshare", "-Urm").communicate()
    assert err == ""
    line, left = out.splitlines()
    assert f"cannot be written to {place} (No space left on device" in line
    assert left == "['.lock']"


def test_a_place_that_cannot_be_made(root, refuses):
    (root / cache.FOLDER).write_text("in the way")
    data = read(root)
    assert same(data, read(root, cache="none"))
    (note,) = data.notes
    assert note.startswith(f"decoded into memory: {root / cache.FOLDER} can't be written (")
    with refuses("can't be kept in", "data.cache=none"):
        read(root, cache=str(root / cache.FOLDER))


def test_no_room_for_the_lock(root, monkeypatch, refuses):
    def full(*arguments, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with refuses("No space left on device", "data.cache=FOLDER"):
        read(root)


def test_what_is_left_behind_is_passed_over(root):
    """The cache lies in the root, where domains are looked for."""
    read(root)
    assert read(root).names == ("photo", "sketch")
