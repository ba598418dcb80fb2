"""Large delimited files of numbers, parsed by numpy a block at a time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hstu_ext.data.errors import broken_file, broken_row

BLOCK = 1 << 22  # bytes
LONGEST_INTEGER = 18  # digits, which int64 always holds
LONGEST_DECIMAL = 8  # characters, which a uint64 holds
MARK = b"\t"  # stands for the separator, which may be longer
NEWLINE, RETURN, ZERO = b"\n"[0], b"\r"[0], b"0"[0]
DECIMAL = re.compile(rb"[0-9]+(\.[0-9]*)?")


class Column(NamedTuple):
    name: str
    decimal: bool = False  # float32, of at most LONGEST_DECIMAL characters; otherwise int64, digits alone


def read_numeric_table(
    stream: BinaryIO, file: str, separator: str, columns: Sequence[Column], *, header: bool = False
) -> list[NDArray[Any]]:
    """The columns of a file without quotes, one row a line.

    header: the first line must be the names of the columns. Lines may end in CR LF. Anything else raises DataError.
    """
    layout = separator.replace("\t", "<tab>").join(column.name for column in columns)
    line = 1
    if header:
        first = stream.readline()
        if first.rstrip(b"\r\n") != layout.encode():
            raise broken_row(file, 1, f"the header '{layout}'", first)
        line = 2
    blocks: list[list[NDArray[Any]]] = []
    rest = b""
    while True:
        block = stream.read(BLOCK)
        text = rest + block
        if not block:
            text += b"\n" if text else b""
            rest = b""
        else:
            cut = text.rfind(b"\n") + 1
            text, rest = text[:cut], text[cut:]
            if len(rest) >= BLOCK:
                raise broken_row(file, line, f"{len(columns)} columns {layout}", rest)
        if text:
            blocks.append(_parse(text, file, line, separator.encode(), columns, layout))
            line += len(blocks[-1][0])
        if not block:
            break
    if not blocks:
        raise broken_file(file, f"rows {layout}", "an empty file")
    return [np.concatenate(parts) for parts in zip(*blocks)]


def _parse(
    text: bytes, file: str, line: int, separator: bytes, columns: Sequence[Column], layout: str
) -> list[NDArray[Any]]:
    """The columns of whole lines, the first of which is this line of the file."""
    ambiguous = separator != MARK and MARK in text
    marked = text.replace(separator, MARK)
    buffer = np.frombuffer(marked, np.uint8)
    ends = np.flatnonzero((buffer == MARK[0]) | (buffer == NEWLINE))
    last_of_row = np.arange(len(ends)) % len(columns) == len(columns) - 1
    if ambiguous or len(ends) % len(columns) or ((buffer[ends] == NEWLINE) != last_of_row).any():
        for number, content in enumerate(text.split(b"\n")):
            if content.count(separator) != len(columns) - 1 or (ambiguous and MARK in content):
                raise broken_row(file, line + number, f"{len(columns)} columns {layout}", content)
    starts = np.concatenate([np.zeros(1, ends.dtype), ends[:-1] + 1])
    parsed = []
    for place, column in enumerate(columns):
        start = starts[place :: len(columns)].copy()
        end = ends[place :: len(columns)].copy()
        if place == len(columns) - 1:
            end -= (buffer[end - 1] == RETURN) & (end > start)
        values, good = (_decimals if column.decimal else _integers)(buffer, start, end)
        if not good.all():
            row = int(good.argmin())
            kind = (
                f"a number of at most {LONGEST_DECIMAL} characters"
                if column.decimal
                else f"an integer of at most {LONGEST_INTEGER} digits"
            )
            raise broken_row(file, line + row, f"{kind} as {column.name}", marked[start[row] : end[row]])
        parsed.append(values)
    return parsed


def _integers(
    buffer: NDArray[np.uint8], start: NDArray[np.int64], end: NDArray[np.int64]
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """The values of the fields, and whether each is one."""
    width = end - start
    good = (width >= 1) & (width <= LONGEST_INTEGER)
    values = np.zeros(len(width), np.int64)
    for place in range(min(int(width.max()), LONGEST_INTEGER)):
        digit = buffer.take(start + place, mode="clip") - np.uint8(ZERO)  # anything below "0" wraps to far above 9
        inside = width > place
        good &= (digit <= 9) | ~inside
        values = np.where(inside, values * 10 + digit, values)
    return values, good


def _decimals(
    buffer: NDArray[np.uint8], start: NDArray[np.int64], end: NDArray[np.int64]
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """As _integers. The distinct texts of ratings are few, so each is parsed once."""
    width = end - start
    good = (width >= 1) & (width <= LONGEST_DECIMAL)
    packed = np.zeros((len(width), LONGEST_DECIMAL), np.uint8)
    for place in range(min(int(width.max()), LONGEST_DECIMAL)):
        packed[:, place] = np.where(width > place, buffer.take(start + place, mode="clip"), 0)
    keys, inverse = np.unique(packed.view(np.uint64)[:, 0], return_inverse=True)
    texts = keys.view(f"S{LONGEST_DECIMAL}").tolist()
    known = np.array([DECIMAL.fullmatch(text) is not None for text in texts])
    values = np.array([float(text) if is_known else 0.0 for text, is_known in zip(texts, known)], np.float32)
    return values[inverse], good & known[inverse]
