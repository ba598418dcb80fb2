"""Fetches the official MovieLens archives and checks them."""

from __future__ import annotations

import hashlib
import http.client
import sys
import urllib.request
from pathlib import Path

from hstu_ext.data.errors import DataError

URL = "https://files.grouplens.org/datasets/movielens/{name}.zip"
DATASETS = {  # MD5 of the archive, as published beside it (<name>.zip.md5)
    "ml-100k": "0e33842e24a9c977be4e0107933c0723",
    "ml-1m": "c4d9eecfca2ab87c1945afe126590906",
    "ml-20m": "cd245b17a1ae2cc31bb14903e1204af3",
}
BLOCK = 1 << 18  # bytes
TIMEOUT = 60  # seconds without a byte


def download(name: str, folder: Path) -> Path:
    """Fetches <name>.zip into the folder and returns its path. Progress goes to stderr.

    An archive that is there and whole is kept. The file appears under its name once its checksum is right; a wrong
    checksum, or no answer from the server, raises DataError and leaves nothing behind.
    """
    if name not in DATASETS:
        raise DataError(f"hstu_ext.data: download must be one of {', '.join(DATASETS)}, got {name!r}")
    target = folder / f"{name}.zip"
    if target.is_file() and _md5(target) == DATASETS[name]:
        print(f"{target} is there and whole", file=sys.stderr)
        return target
    folder.mkdir(parents=True, exist_ok=True)
    url = URL.format(name=name)
    part = target.with_name(target.name + ".part")
    try:
        try:
            _fetch(url, part)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise DataError(f"hstu_ext.data: {url}: {reason}; the file may be put at {target} by hand") from error
        found = _md5(part)
        if found != DATASETS[name]:
            raise DataError(f"hstu_ext.data: {url}: expected MD5 {DATASETS[name]}, got {found}")
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    print(f"{target}: checksum right. The terms of use are in its README.", file=sys.stderr)
    return target


def _fetch(url: str, target: Path) -> None:
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response, target.open("wb") as out:
        size = int(response.headers.get("Content-Length") or 0)
        done, shown = 0, -1
        while block := response.read(BLOCK):
            out.write(block)
            done += len(block)
            tenth = 10 * done // size if size else 0
            if tenth != shown:
                shown = tenth
                of = f" of {size / 1e6:.1f}" if size else ""
                print(f"{url}: {done / 1e6:.1f}{of} MB", file=sys.stderr)


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
