"""Fetching the archives of a data set: whole and checked, or not there."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError

from filelock import FileLock

from dgavg.errors import UserError, require

Arrange = Callable[[Path], Path]
"""Makes a tree of what was unpacked into a folder, checks it, and says where it is."""


@dataclass(frozen=True)
class Archive:
    """An archive at `url` (http, https or a Google Drive file), kept as `file` while it is read.

    The suffix of `file` says how to unpack it; a file of another suffix (.txt) stays as it is.
    """

    url: str
    file: str


def drive(file_id: str, file: str) -> Archive:
    """An archive on Google Drive."""
    return Archive(f"https://drive.google.com/uc?id={file_id}", file)


def fetch(target: Path, archives: Sequence[Archive], arrange: Arrange, by_hand: str) -> None:
    """Download and unpack archives and put the tree that `arrange` makes of them at `target`.

    All happens in a folder beside it, which is renamed when all is there: a download that is
    stopped leaves nothing that a later run takes for the data set. Of several processes one
    fetches, the others wait. Does nothing where `target` has something in it already.

    Raises `UserError`, which ends in `by_hand`, where anything fails.
    """
    _check_gdown(archives, by_hand)
    part = target.with_name(target.name + ".part")
    url = archives[0].url
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{target.name}.lock")):
            if target.is_dir() and any(target.iterdir()):
                return
            shutil.rmtree(part, ignore_errors=True)
            try:
                for archive in archives:
                    url = archive.url
                    _get(archive, part)
                arrange(part).rename(target)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    except UserError as error:
        raise UserError(f"the download of {url} is not what it should be: {error}") from error
    except Exception as error:  # urllib, sockets, archives, the disk: the remedy is the same
        if isinstance(error, HTTPError):
            error.close()  # it holds the connection
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"{url} could not be downloaded to {target} ({reason}); {by_hand}"
        ) from error


def _check_gdown(archives: Sequence[Archive], by_hand: str) -> None:
    needed = any("drive.google.com" in archive.url for archive in archives)
    require(
        not needed or importlib.util.find_spec("gdown") is not None,
        f"{archives[0].url} is on Google Drive, which needs gdown: pip install gdown, or {by_hand}",
    )


def _get(archive: Archive, folder: Path) -> None:
    """Download one archive into `folder` and unpack it there."""
    from torchvision.datasets.utils import download_and_extract_archive, download_url

    if archive.file.endswith((".zip", ".tar", ".tar.gz")):
        download_and_extract_archive(
            archive.url, str(folder), filename=archive.file, remove_finished=True
        )
    else:
        download_url(archive.url, str(folder), archive.file)
