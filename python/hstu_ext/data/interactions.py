"""Logs with one event a row: CSV or Parquet with named columns."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from hstu_ext.data.errors import DataError, broken_file, broken_row
from hstu_ext.data.events import Events, Vocabulary, check_id, parse_decimals, parse_integers
from hstu_ext.data.files import csv_blocks, line_of

ROLES = ("user", "item", "time", "rating", "action")
DEFAULT_COLUMNS = {
    "user": "user_id",
    "item": "item_id",
    "time": "timestamp",
    "rating": "rating",
    "action": "action",
}
ROWS_AT_A_TIME = 512  # more of them leave the processor's cache before they are parsed
ID = "an id in UTF-8 without blanks around it"
KINDS = {"user": ID, "item": ID, "action": ID, "time": "an integer", "rating": "a number"}


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
    blocks = csv_blocks(stream, file, ROWS_AT_A_TIME)
    first_line, first_rows = next(blocks, (1, []))
    if not first_rows:
        raise broken_file(file, "a header", "an empty file")
    header = first_rows[0]
    first_block = line_of(first_line, first_rows, 1), first_rows[1:]
    chosen = columns_of(file, header, columns)
    places = {role: header.index(name) for role, name in chosen.items()}
    vocabularies = {role: Vocabulary() for role in chosen if role in ("user", "item", "action")}
    parts: dict[str, list[NDArray[Any]]] = {role: [] for role in chosen}
    for line, rows in chain([first_block], blocks):
        if set(map(len, rows)) - {len(header)}:
            place = next(place for place, row in enumerate(rows) if len(row) != len(header))
            layout = f"{len(header)} columns {','.join(header)}"
            raise broken_row(file, line_of(line, rows, place), layout, ",".join(rows[place]))
        for role, column in places.items():
            texts = [row[column] for row in rows]
            try:
                parts[role].append(_parse(texts, role, vocabularies.get(role)))
            except ValueError:
                place = _first_broken(texts, role, vocabularies.get(role))
                raise broken_row(file, line_of(line, rows, place), f"{KINDS[role]} as {role}", texts[place]) from None
    events = Events(
        users=np.concatenate(parts["user"]),
        items=np.concatenate(parts["item"]),
        user_ids=list(vocabularies["user"]),
        item_ids=list(vocabularies["item"]),
        times=np.concatenate(parts["time"]) if "time" in parts else None,
        ratings=np.concatenate(parts["rating"]) if "rating" in parts else None,
        actions=np.concatenate(parts["action"]) if "action" in parts else None,
        action_names=list(vocabularies.get("action", ())),
    )
    if not len(events.users):
        raise broken_file(file, "rows after the header", "none")
    return events


def _parse(texts: Sequence[str], role: str, vocabulary: Vocabulary | None) -> NDArray[Any]:
    """One column of a block."""
    if vocabulary is not None:
        return np.fromiter(map(vocabulary.__getitem__, texts), np.int64, len(texts))
    return parse_integers(texts) if role == "time" else parse_decimals(texts)


def _first_broken(texts: Sequence[str], role: str, vocabulary: Vocabulary | None) -> int:
    """The place of the first text that `_parse` refuses."""
    for place, text in enumerate(texts):
        try:
            _parse([text], role, vocabulary)
        except ValueError:
            return place
    raise AssertionError("every text is parsed by itself and not together")


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
                try:
                    check_id(text)
                except ValueError:
                    raise broken_file(f"{path}, column {name}", f"{ID} as {role}", repr(text)) from None
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
