"""Folders, zip archives and compressed files, read alike."""

from __future__ import annotations

import csv
import gzip
import io
import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import BinaryIO, cast

from hstu_ext.data.errors import broken_file, broken_row

LONGEST_FIELD = 1 << 27  # characters of a quoted field; a user's whole sequence is one


def expand(path: str | os.PathLike[str]) -> Path:
    """The path with ~ and $VARIABLES filled in."""
    text = os.path.expanduser(os.path.expandvars(os.fspath(path)))
    unset = re.search(r"\$\{?(\w+)\}?", text)
    if unset:
        raise broken_file(os.fspath(path), f"the environment variable {unset[1]} to be set", "none of that name")
    return Path(text)


class Folder:
    """A folder, or the folder in a zip archive that holds the first of these files that there is.

    found: the name of that file, or None
    """

    def __init__(self, path: Path, wanted: Sequence[str]) -> None:
        self.path = path
        self._prefix = ""
        self._zip: zipfile.ZipFile | None = None
        if path.is_dir():
            self.found = next((name for name in wanted if (path / name).is_file()), None)
            return
        with compressed(str(path)):
            self._zip = zipfile.ZipFile(path)
        members = sorted(self._zip.namelist(), key=lambda member: (member.count("/"), member))
        places = [(name, member) for name in wanted for member in members if member.rpartition("/")[2] == name]
        self.found = places[0][0] if places else None
        if places:
            self._prefix = places[0][1][: -len(places[0][0])]

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *error: object) -> None:
        if self._zip is not None:
            self._zip.close()

    def has(self, name: str) -> bool:
        if self._zip is None:
            return (self.path / name).is_file()
        return self._prefix + name in self._zip.namelist()

    def label(self, name: str) -> str:
        """What errors call the file."""
        return str(self.path / (self._prefix + name))

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """The file's bytes, uncompressed where its name ends in .gz. Errors of the compression become DataError."""
        with compressed(self.label(name)):
            raw = (self.path / name).open("rb") if self._zip is None else self._zip.open(self._prefix + name)
            with raw:
                if name.endswith(".gz"):
                    with gzip.GzipFile(fileobj=raw) as stream:
                        yield cast(BinaryIO, stream)
                else:
                    yield cast(BinaryIO, raw)


@contextmanager
def compressed(file: str) -> Iterator[None]:
    """Turns what the decompressors raise into DataError."""
    try:
        yield
    except (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise broken_file(file, "an intact archive", str(error)) from error


def csv_blocks(stream: BinaryIO, file: str, size: int) -> Iterator[tuple[int, list[list[str]]]]:
    """The rows of a UTF-8 CSV file, `size` at a time, with the line that the first begins on.

    Bytes that are not UTF-8 become lone surrogates, which `check_id` refuses; a byte-order mark is passed over.
    """
    line = 1
    limit = csv.field_size_limit(LONGEST_FIELD)
    rows: list[list[str]] = []
    try:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, strict=True)
        while True:
            rows = []
            rows.extend(islice(reader, size))
            if not rows:
                return
            yield line, rows
            line = reader.line_num + 1
    except csv.Error as error:
        raise broken_row(file, line_of(line, rows, len(rows)), "a row of CSV", str(error)) from error
    finally:
        csv.field_size_limit(limit)


def line_of(first: int, rows: Sequence[Sequence[str]], place: int) -> int:
    """The line that a row of a block begins on. Quoted fields may hold line ends."""
    return first + place + sum(field.count("\n") for row in rows[:place] for field in row)


def csv_rows(stream: BinaryIO, file: str) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV file, each with the line that it begins on."""
    for line, rows in csv_blocks(stream, file, 1):
        yield line, rows[0]
