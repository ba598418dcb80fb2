"""Logs with one event a row: CSV or Parquet with named columns."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from hstu_ext.data.errors import DataError, broken_file, broken_row
from hstu_ext.data.events import Events, Vocabulary, concatenated, parse_decimals, parse_integers
from hstu_ext.data.files import csv_rows

ROLES = ("user", "item", "time", "rating", "action")
DEFAULT_COLUMNS = {
    "user": "user_id",
    "item": "item_id",
    "time": "timestamp",
    "rating": "rating",
    "action": "action",
}
ROWS_AT_A_TIME = 1 << 16


def columns_of(file: str, header: Sequence[str], columns: Mapping[str, str] | None) -> dict[str, str]:
    """The columns to read, by role. Without `columns`, those of the default names that there are."""
    chosen = dict(columns) if columns is not None else {r: n for r, n in DEFAULT_COLUMNS.items() if n in header}
    for role in chosen:
        if role not in ROLES:
            raise DataError(f"hstu_ext.data: columns must name {', '.join(ROLES)}, got {role!r}")
    missing = [DEFAULT_COLUMNS[role] for role in ("user", "item") if role not in chosen]
    missing += [name for name in chosen.values() if name not in header]
    if missing:
        raise broken_row(file, 1, f"the columns {', '.join(missing)} (or others, named by `columns`)", ",".join(header))
    return chosen


def read_interactions_csv(stream: BinaryIO, file: str, columns: Mapping[str, str] | None = None) -> Events:
    """A header, then one event a row. Times are integers; ids are any text. Without times, rows are in order."""
    rows = csv_rows(stream, file)
    header = next(rows, (1, []))[1]
    if not header:
        raise broken_file(file, "a header", "an empty file")
    chosen = columns_of(file, header, columns)
    places = {role: header.index(name) for role, name in chosen.items()}
    vocabularies = {role: Vocabulary() for role in chosen if role in ("user", "item", "action")}
    parts: dict[str, list[NDArray[Any]]] = {role: [] for role in chosen}
    for lines, block in _blocks(rows, file, header):
        for role, place in places.items():
            texts = [row[place] for row in block]
            parts[role].append(_parse(texts, role, vocabularies.get(role), lines, file))
    if not parts["user"]:
        raise broken_file(file, "rows after the header", "none")
    return Events(
        users=concatenated(parts["user"], np.int64),
        items=concatenated(parts["item"], np.int64),
        user_ids=list(vocabularies["user"]),
        item_ids=list(vocabularies["item"]),
        times=concatenated(parts["time"], np.int64) if "time" in parts else None,
        ratings=concatenated(parts["rating"], np.float32) if "rating" in parts else None,
        actions=concatenated(parts["action"], np.int64) if "action" in parts else None,
        action_names=list(vocabularies.get("action", ())),
    )


def _blocks(
    rows: Iterator[tuple[int, list[str]]], file: str, header: Sequence[str]
) -> Iterator[tuple[list[int], list[list[str]]]]:
    """Rows of the header's width by the block, with their lines."""
    while True:
        block = list(islice(rows, ROWS_AT_A_TIME))
        if not block:
            return
        for line, row in block:
            if len(row) != len(header):
                raise broken_row(file, line, f"{len(header)} columns {','.join(header)}", ",".join(row))
        yield [line for line, _ in block], [row for _, row in block]


def _parse(texts: list[str], role: str, vocabulary: Vocabulary | None, lines: list[int], file: str) -> NDArray[Any]:
    """One column of a block."""
    try:
        if vocabulary is not None:
            return np.array([vocabulary[text] for text in texts], np.int64)
        return parse_integers(texts) if role == "time" else parse_decimals(texts)
    except ValueError:
        if len(texts) > 1:
            for text, line in zip(texts, lines):
                _parse([text], role, vocabulary, [line], file)
        kinds = {"time": "an integer", "rating": "a number"}
        kind = kinds.get(role, "an id without blanks around it")
        raise broken_row(file, lines[0], f"{kind} as {role}", texts[0]) from None


def read_interactions_parquet(path: str, columns: Mapping[str, str] | None = None) -> Events:
    """One event a row. Ids are text or integers, times integers or timestamps (taken as whole seconds)."""
    try:
        parquet, arrow = importlib.import_module("pyarrow.parquet"), importlib.import_module("pyarrow")
    except ImportError:
        raise ImportError(
            "hstu_ext.data: reading Parquet needs pyarrow, the extra `parquet`: pip install 'hstu_ext[parquet]'"
        ) from None
    try:
        file = parquet.ParquetFile(path)
        chosen = columns_of(path, file.schema_arrow.names, columns)
        table = file.read(columns=list(dict.fromkeys(chosen.values())))
    except arrow.ArrowInvalid as error:
        raise broken_file(path, "a Parquet file", str(error)) from error
    if not table.num_rows:
        raise broken_file(path, "rows", "none")
    read: dict[str, Any] = {"names": {}}
    for role, name in chosen.items():
        column = table.column(name).combine_chunks()
        if column.null_count:
            row = column.is_null().index(True).as_py()
            raise broken_file(f"{path}, column {name}, row {row + 1}", f"a {role}", "null")
        kinds = arrow.types
        if role == "time":
            if kinds.is_timestamp(column.type):
                column = column.cast(arrow.timestamp("s"), safe=False)
            elif not kinds.is_integer(column.type):
                raise broken_file(f"{path}, column {name}", "integers or timestamps", str(column.type))
            read[role] = column.cast(arrow.int64()).to_numpy(zero_copy_only=False)
        elif role == "rating":
            if not (kinds.is_integer(column.type) or kinds.is_floating(column.type)):
                raise broken_file(f"{path}, column {name}", "numbers", str(column.type))
            read[role] = column.cast(arrow.float32(), safe=False).to_numpy(zero_copy_only=False)
            bad = ~np.isfinite(read[role])
            if bad.any():
                row = int(bad.argmax())
                raise broken_file(f"{path}, column {name}, row {row + 1}", "a finite number", str(column[row]))
        else:
            if not (
                kinds.is_integer(column.type) or kinds.is_string(column.type) or kinds.is_large_string(column.type)
            ):
                raise broken_file(f"{path}, column {name}", "text or integers as ids", str(column.type))
            encoded = column.dictionary_encode()
            names = [str(name) for name in encoded.dictionary.to_pylist()]
            for text in names:
                if not text or text != text.strip():
                    raise broken_file(f"{path}, column {name}", f"a {role} without blanks around it", repr(text))
            read[role] = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
            read["names"][role] = names
    return Events(
        users=read["user"],
        items=read["item"],
        user_ids=read["names"]["user"],
        item_ids=read["names"]["item"],
        times=read.get("time"),
        ratings=read.get("rating"),
        actions=read.get("action"),
        action_names=read["names"].get("action", ()),
    )
