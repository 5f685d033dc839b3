"""Archives from a real server: whole and checked, or not there."""

import functools
import http.server
import io
import sys
import tarfile
import threading
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from dgavg.data import downloads
from dgavg.data.catalogue import PACS
from dgavg.data.downloads import Archive, drive, fetch
from dgavg.data.published import load_published

BY_HAND = "get it by hand"
SETTINGS = {
    "size": 4, "domains": None, "check": True, "on_bad_image": "error", "workers": 1,
    "cache": "none",
}  # fmt: skip


class Server(http.server.ThreadingHTTPServer):
    """Remembers what was asked for, and waits for its threads when it is closed."""

    daemon_threads = False

    def __init__(self, folder):
        self.asked = []
        super().__init__(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))

    def handle_error(self, request, client_address):
        """torchvision looks for redirects first, and hangs up."""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.asked.append(self.path)
        super().do_GET()


@pytest.fixture
def server(tmp_path):
    """A server of a folder: its address, the folder, and what was asked for."""
    folder = tmp_path / "served"
    folder.mkdir()
    with Server(folder) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}", folder, found.asked
        found.shutdown()


def png(seed):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def archive_of(path, inside, domains=tuple(PACS.domains), each=2, classes=PACS.classes):
    """A zip with the folder `inside`, `each` images in every class of every domain."""
    with zipfile.ZipFile(path, "w") as out:
        for d in domains:
            for c in classes:
                for i in range(each):
                    out.writestr(f"{inside}/{d}/{c}/{i}.png", png(hash((d, c, i)) % 1000))


def about(url, each=2, file="PACS.zip"):
    counts = dict.fromkeys(PACS.domains, 7 * each)
    return replace(PACS, counts=counts, total=28 * each, archives=(Archive(url, file),))


def left(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_fetches_what_is_missing_once(server, tmp_path):
    address, served, asked = server
    archive_of(served / "pacs.zip", "kfold")
    root = tmp_path / "data"
    pacs = about(f"{address}/pacs.zip")
    data = load_published(pacs, root=str(root), download=True, **SETTINGS)
    assert data.names == tuple(PACS.domains)
    assert [len(domain) for domain in data.domains] == [14] * 4
    assert left(root) == ["PACS"]
    assert left(root / "PACS") == sorted(PACS.domains)
    before = len(asked)
    load_published(pacs, root=str(root), download=True, **SETTINGS)
    assert len(asked) == before > 0


def test_without_download_nothing_is_asked_for(server, tmp_path, refuses):
    address, served, asked = server
    archive_of(served / "pacs.zip", "kfold")
    with refuses("no PACS in", "data.download=true to fetch it", PACS.page):
        load_published(
            about(f"{address}/pacs.zip"), root=str(tmp_path / "data"), download=False, **SETTINGS
        )
    assert asked == []
    assert not (tmp_path / "data").exists()


def test_what_fails_is_one_line_and_leaves_nothing(server, tmp_path, refuses):
    address, served, _ = server
    archive_of(served / "whole.zip", "kfold")
    whole = (served / "whole.zip").read_bytes()
    (served / "cut.zip").write_bytes(whole[: len(whole) // 2])
    archive_of(served / "fewer.zip", "kfold", each=1)
    archive_of(served / "three.zip", "kfold", domains=tuple(PACS.domains)[:3])
    archive_of(served / "class.zip", "kfold", classes=PACS.classes[:6])
    root = tmp_path / "data"
    for name, parts in {
        "none.zip": ("404", "get it by hand"),
        "cut.zip": ("could not be downloaded", "get it by hand"),
        "fewer.zip": ("art_painting has 7, not 14", "fetch it again"),
        "three.zip": ("there are no folders art_painting, cartoon, photo, sketch in it",),
        "class.zip": ("6 classes",),
    }.items():
        url = f"{address}/{name}"
        with refuses(url, *parts):
            load_published(about(url), root=str(root), download=True, **SETTINGS)
        assert left(root) == []


def test_counts_are_not_checked_where_that_is_said(server, tmp_path):
    address, served, _ = server
    archive_of(served / "pacs.zip", "kfold", each=1)
    settings = SETTINGS | {"check": False}
    data = load_published(
        about(f"{address}/pacs.zip"), root=str(tmp_path), download=True, **settings
    )
    assert len(data.domains[0]) == 7


def test_what_a_killed_download_left_is_not_trusted(server, tmp_path):
    """torchvision takes any file of the archive's name for the archive."""
    address, served, _ = server
    archive_of(served / "pacs.zip", "kfold")
    part = tmp_path / "data" / "PACS.part"
    part.mkdir(parents=True)
    (part / "PACS.zip").write_bytes((served / "pacs.zip").read_bytes()[:1000])
    pacs = about(f"{address}/pacs.zip")
    data = load_published(pacs, root=str(tmp_path / "data"), download=True, **SETTINGS)
    assert len(data.domains[0]) == 14
    assert left(tmp_path / "data") == ["PACS"]


def test_one_fetches_while_others_wait(server, tmp_path):
    address, served, asked = server
    archive_of(served / "pacs.zip", "kfold")
    target, done = tmp_path / "data" / "PACS", []

    def arrange(part):
        done.append(part)
        return part / "kfold"

    def one():
        fetch(target, [Archive(f"{address}/pacs.zip", "PACS.zip")], arrange, BY_HAND)

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 1
    assert len(asked) <= 2  # torchvision asks for redirects, then for the file
    assert (target / "photo" / "dog" / "0.png").is_file()


def test_tar_archives_and_plain_files(server, tmp_path):
    address, served, _ = server
    (served / "notes.txt").write_text("a list")
    with tarfile.open(served / "images.tar.gz", "w:gz") as out:
        out.add(served / "notes.txt", "inside/a.txt")
    archives = [
        Archive(f"{address}/images.tar.gz", "images.tar.gz"),
        Archive(f"{address}/notes.txt", "list.txt"),
    ]
    fetch(tmp_path / "to", archives, lambda part: part, BY_HAND)
    found = {p.relative_to(tmp_path / "to").as_posix() for p in (tmp_path / "to").rglob("*.txt")}
    assert found == {"inside/a.txt", "list.txt"}
    assert left(tmp_path / "to") == ["inside", "list.txt"]


def test_an_archive_that_would_write_elsewhere_is_refused(server, tmp_path, refuses):
    address, served, _ = server
    (served / "notes.txt").write_text("a list")
    with tarfile.open(served / "evil.tar", "w") as out:
        out.add(served / "notes.txt", "../../evil.txt")
    archives = [Archive(f"{address}/evil.tar", "evil.tar")]
    with refuses("evil.tar could not be downloaded", BY_HAND):
        fetch(tmp_path / "data" / "to", archives, lambda part: part, BY_HAND)
    assert not list(tmp_path.rglob("evil.txt"))


def test_a_folder_that_cannot_be_written(server, tmp_path, refuses):
    address, *_ = server
    (tmp_path / "file").write_text("no folder")
    with refuses("could not be downloaded to", BY_HAND):
        fetch(
            tmp_path / "file" / "to", [Archive(f"{address}/a.zip", "a.zip")], lambda p: p, BY_HAND
        )


def test_google_drive_needs_gdown(tmp_path, refuses, monkeypatch):
    monkeypatch.setitem(sys.modules, "gdown", None)
    archive = drive("1JFr8f805nMUelQWWmfnJR3y4_SYoN5Pd", "PACS.zip")
    with refuses("Google Drive", "pip install gdown", BY_HAND):
        fetch(tmp_path / "data" / "PACS", [archive], lambda part: part, BY_HAND)
    assert not (tmp_path / "data").exists()
    assert archive.url.startswith("https://drive.google.com/")
    assert downloads.drive("x", "y").file == "y"
